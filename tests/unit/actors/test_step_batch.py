"""From chunks to packed rows, whole and in micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from actors.engine.plan import Chunk
from actors.engine.request import Draw, SamplingParams
from actors.messages import CPU
from actors.step_batch import sample_chunks, split_chunks, step_batch

BLOCK = 4


def chunk(number: int, length: int, start: int = 0, draws: bool = True, told: int = 0) -> Chunk:
    """Of request ``r<number>``, whose tokens lie in blocks of its own, in falling order."""
    table = tuple(range(100 * number + 50, 100 * number, -1))
    positions = range(start, start + length)
    return Chunk(
        f"r{number}",
        tuple(1000 * number + p for p in positions),
        start,
        tuple(table[p // BLOCK] * BLOCK + p % BLOCK for p in positions),
        table,
        Draw(SamplingParams(), number) if draws else None,
        tuple(range(told)),
        prompt_logprobs=3,
    )


MIXED = (chunk(0, 1, 5), chunk(1, 7, told=6), chunk(2, 1, 9), chunk(3, 1, 2), chunk(4, 11, 3, draws=False, told=11))

chunks_of = st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 40)), st.integers(0, 9), st.booleans()), min_size=1)


@given(chunks_of, st.integers(1, 9))
@example([(3, 0, True), *[(1, 5, True)] * 9], 7)  # the decodes of a part grow where its rows do not
def test_parts_are_about_equal_and_nothing_is_lost(shapes: list[tuple[int, int, bool]], parts: int) -> None:
    chunks = [chunk(n, length, start, draws) for n, (length, start, draws) in enumerate(shapes)]
    rows = sum(len(c.token_ids) for c in chunks)
    parts = min(parts, rows)
    split = split_chunks(chunks, parts)
    sizes = [sum(len(c.token_ids) for c in part) for part in split]
    assert len(split) == parts
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 2
    pieces = [piece for part in split for piece in part]
    for whole in chunks:
        own = [piece for piece in pieces if piece.request_id == whole.request_id]
        assert sum((piece.token_ids for piece in own), ()) == whole.token_ids
        assert sum((piece.slots for piece in own), ()) == whole.slots
        assert [piece.draw for piece in own] == [None] * (len(own) - 1) + [whole.draw]
        assert {piece.block_table for piece in own} == {whole.block_table}
        assert all(piece.token_ids[0] == 1000 * int(piece.request_id[1:]) + piece.start for piece in own)
    for kind in (True, False):
        order = [c.request_id for c in chunks if (len(c.token_ids) == 1) == kind]
        assert list(dict.fromkeys(p.request_id for p in pieces if p.request_id in order)) == order


def test_each_part_has_its_share_of_decodes_and_of_prefill() -> None:
    first, second = split_chunks(MIXED, 2)
    assert [(c.request_id, c.start, len(c.token_ids)) for c in first] == [("r0", 5, 1), ("r1", 0, 7), ("r4", 3, 2)]
    assert [(c.request_id, c.start, len(c.token_ids)) for c in second] == [("r2", 9, 1), ("r3", 2, 1), ("r4", 5, 9)]


def test_targets_of_the_prompt_go_with_their_rows() -> None:
    split = split_chunks([chunk(1, 10, told=7)], 3)
    assert [piece.prompt_targets for (piece,) in split] == [(0, 1, 2), (3, 4, 5), (6,)]
    assert {piece.prompt_logprobs for (piece,) in split} == {3}


def test_a_step_in_one_part_stays_as_it_is() -> None:
    assert split_chunks(MIXED, 1) == [list(MIXED)]


@pytest.mark.parametrize("parts", [0, 22])
def test_more_parts_than_rows_are_refused(parts: int) -> None:
    with pytest.raises(ValueError, match=f"parts is {parts}; allowed is 1 to the number of rows, 21"):
        split_chunks(MIXED, parts)


def test_rows_are_packed_and_those_that_draw_come_before_those_with_targets() -> None:
    batch = step_batch(MIXED, CPU)
    assert batch.token_ids.tolist() == [t for c in MIXED for t in c.token_ids]
    assert batch.slots.tolist() == [slot for c in MIXED for slot in c.slots]
    assert batch.positions.tolist() == [5, *range(7), 9, 2, *range(3, 14)]
    assert [(s.start, s.length, s.context) for s in batch.segments] == [
        (0, 1, 5), (1, 7, 0), (8, 1, 9), (9, 1, 2), (10, 11, 3),
    ]  # fmt: skip
    assert batch.output_rows.tolist() == [0, 7, 8, 9, *range(1, 7), *range(10, 21)]


def test_one_token_is_sampled_for_each_chunk_that_draws() -> None:
    logits = torch.eye(4, 9)
    assert sample_chunks(MIXED, logits) == [0, 1, 2, 3]
