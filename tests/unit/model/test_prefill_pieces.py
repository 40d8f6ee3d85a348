"""Pieces of prefills that pass through the layers in several steps: no bit depends on where they waited."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.engine.plan import Chunk, Pace, Piece, Progress, StepPlan
from actors.engine.request import Draw, SamplingParams
from actors.messages import CPU
from actors.model.decoder import MoE
from actors.prefill_pieces import PrefillPieces, StepPieces
from actors.step_batch import split_chunks, step_batch
from tests.micro_batched import MicroBatched
from tests.paged_runner import PagedRunner, random_ids

CheckpointOf = Callable[..., tuple[Path, Any]]
VOCAB = {"vocab_size": 203}
FAMILIES = ("qwen2_moe", "deepseek_v3", "deepseek_v32")  # one with dense layers before its MoE layers
STREAM, LONG, SHORT, OTHER = (random_ids(count, seed=count, vocab=203) for count in (9, 23, 6, 11))


class Script(Pace):
    """Allows what a list says."""

    def __init__(self, allowed: Iterator[bool], limit_s: float = 1.0) -> None:
        super().__init__(limit_s, 0.5)
        object.__setattr__(self, "allowed", allowed)

    def allows(self, elapsed_s: float, share: float, rest_s: float, layer_s: float) -> bool:
        return share > 0 and next(self.allowed)  # type: ignore[attr-defined]


class Noted:
    """Passes on to the experts, and notes what they are asked for: layer, micro-batch. Each answer lies where the next
    one will lie, as in a frame."""

    def __init__(self, moe: MoE) -> None:
        self.moe = moe
        self.asked: list[tuple[int, int]] = []
        self.under_way = self.most_under_way = 0
        self._answer = torch.zeros(0)

    def start(self, layer: int, rows: Tensor, micro_batch: int = 0) -> object:
        self.asked.append((layer, micro_batch))
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        return self.moe.start(layer, rows, micro_batch)

    def finish(self, handle: object) -> Tensor:
        self.under_way -= 1
        self._answer.fill_(float("nan"))
        self._answer = self.moe.finish(handle).clone()
        return self._answer


class Steps:
    """One stream that decodes, and pieces beside it."""

    def __init__(self, path: Path, apart: bool) -> None:
        self.runner = MicroBatched(path, row_block=8, n_blocks=256)
        self.moe = Noted(self.runner.moe)
        self.pieces = PrefillPieces(self.runner.model, self.runner.cache, CPU, apart)
        self.parts = 1 if apart else 2
        self.logits: dict[str, Tensor] = {}

    def chunks(self, *work: tuple[int, int]) -> list[Chunk]:
        return self.runner.chunks(work)

    def step(self, chunks: Sequence[Chunk], pieces: Sequence[Piece], pace: Pace | None) -> Progress:
        """Every row's logits are noted, by request; each chunk of a piece that draws draws the number of its rows."""
        plan = StepPlan(tuple(chunks), (), pieces=tuple(pieces), pace=pace)
        split = split_chunks(chunks, min(self.parts, len(chunks))) if chunks else []
        self.moe.asked.clear()

        def draw(drawn: Sequence[Chunk], hidden: Tensor) -> dict[str, int | None]:
            rows = hidden[sum(chunk.draw is not None for chunk in drawn) :]
            for chunk, own in zip(drawn, rows.split([len(chunk.token_ids) for chunk in drawn]), strict=True):
                self.logits[chunk.request_id] = self.runner.model.head(own)
            return {chunk.request_id: len(chunk.token_ids) for chunk in drawn if chunk.draw}

        def done(part: int, hidden: Tensor) -> None:
            draw(split[part], hidden)

        beside = StepPieces(self.pieces, plan, self.moe, len(split), draw, 0.0)
        batches = [step_batch(part, CPU) for part in split]
        model, cache = self.runner.model, self.runner.cache
        model.run(batches, cache, self.moe, done, beside)
        beside.over()
        assert self.moe.under_way == 0
        if chunks or pace is None:
            assert self.moe.asked[-1] == (self.runner.spec.moe_layers[-1], 0)
        assert len({*self.moe.asked}) == len(self.moe.asked)
        progress = beside.progress
        assert (progress.apart_s > 0) == (beside.apart and progress.passes > 0)
        return replace(progress, apart_s=0.0)


def wanted_logits(path: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    whole = PagedRunner(path, row_block=8, n_blocks=256)
    return [whole.step([(whole.add(ids), len(ids))])[0] for ids in prompts]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_wherever_pieces_wait_no_bit_changes(checkpoint_of: CheckpointOf, family: str, apart: bool) -> None:
    path, _ = checkpoint_of(family, 5, **VOCAB)
    wanted = wanted_logits(path, (STREAM, LONG, SHORT))
    for seed in range(6):
        rng = random.Random(seed)
        steps = Steps(path, apart)
        streams = [steps.runner.add(STREAM) for _ in range(2)]
        steps.step(steps.chunks(*[(one, 3) for one in streams]), (), None)
        long, short = steps.runner.add(LONG), steps.runner.add(SHORT)
        under_way = [
            Piece(1, tuple(steps.chunks((long, 12), (short, 6)))),
            Piece(2, tuple(steps.chunks((long, 11)))),
        ]
        decoded = []
        for _ in range(6):
            allowed = [rng.random() < 0.5 for _ in range(50)]
            pace = Script(iter(allowed)) if rng.random() < 0.9 else None
            progress = steps.step(steps.chunks(*[(one, 1) for one in streams]), under_way, pace)
            decoded.append(steps.logits["0"])
            del under_way[: len(progress.finished)]
        if under_way:
            steps.step((), under_way, None)
        assert torch.equal(torch.cat(decoded), wanted[0][3:])
        assert torch.equal(steps.logits["2"], wanted[1][12:])
        assert torch.equal(steps.logits["3"], wanted[2])
        assert steps.moe.most_under_way == 1 or not apart


@pytest.mark.parametrize("apart", [False, True])
def test_who_leaves_a_piece_takes_its_rows_along_and_changes_no_others(
    checkpoint_of: CheckpointOf, apart: bool
) -> None:
    path, _ = checkpoint_of("glm4_moe", 5, **VOCAB)
    wanted = wanted_logits(path, (LONG, SHORT, OTHER))
    steps = Steps(path, apart)
    stream, *prompts = (steps.runner.add(ids) for ids in (STREAM, LONG, SHORT, OTHER))
    chunks = steps.chunks(*[(number, len(ids)) for number, ids in zip(prompts, (LONG, SHORT, OTHER), strict=True)])
    layers = len(steps.runner.spec.moe_layers)
    assert steps.step(steps.chunks((stream, 1)), [Piece(7, tuple(chunks))], Script(iter([False] * 50))).finished == ()
    left = steps.step((), [Piece(7, (chunks[0], chunks[2]))], None)
    assert left == Progress(((),), pytest.approx((23 + 11) * (layers - 1) / layers))
    assert "2" not in steps.logits
    assert torch.equal(steps.logits["1"], wanted[0])
    assert torch.equal(steps.logits["3"], wanted[2])


def test_the_tokens_of_finished_pieces_are_told(checkpoint_of: CheckpointOf) -> None:
    path, _ = checkpoint_of("glm4_moe", 5, **VOCAB)
    steps = Steps(path, apart=True)
    numbers = [steps.runner.add(ids) for ids in (LONG, SHORT, OTHER)]
    first, second, third = steps.chunks(*zip(numbers, (23, 6, 11), strict=True))
    draws = [
        Chunk(c.request_id, c.token_ids, c.start, c.slots, c.block_table, Draw(SamplingParams(), 0), c.token_ids)
        for c in (first, third)
    ]
    pieces = [Piece(1, (draws[0], second)), Piece(2, (draws[1],))]
    assert steps.step((), pieces, None) == Progress(((23,), (11,)), pytest.approx(40.0))


def test_without_time_pieces_stay_where_they_are_and_others_are_forgotten(checkpoint_of: CheckpointOf) -> None:
    path, _ = checkpoint_of("glm4_moe", 5, **VOCAB)
    steps = Steps(path, apart=True)
    stream, long = steps.runner.add(STREAM), steps.runner.add(LONG)
    piece = Piece(1, tuple(steps.chunks((long, 23))))
    layers = len(steps.runner.spec.moe_layers)
    moved = steps.step(steps.chunks((stream, 1)), [piece], Script(iter([False] * 50)))
    assert moved == Progress((), 23 / layers)  # by one layer at least
    assert steps.step(steps.chunks((stream, 1)), [piece], Script(iter([True] * 50), limit_s=0.0)) == Progress()
    rest = steps.step(steps.chunks((stream, 1)), [piece], None)
    assert rest == Progress(((),), pytest.approx(23 * (layers - 1) / layers))
    assert torch.equal(steps.logits["1"], wanted_logits(path, (LONG,))[0])
    steps.step(steps.chunks((stream, 1)), [piece], Script(iter([False] * 50)))
    steps.step(steps.chunks((stream, 1)), (), None)
    assert steps.step((), [piece], None).passes == pytest.approx(23.0)
