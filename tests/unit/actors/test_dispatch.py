"""Splitting a batch among shards, against plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.dispatch import NOBODY, Owners, ShardRows, dispatch_rows, dispatch_rows_by_numpy, split_rows

Pair = tuple[int, int, int]


def by_loops(chosen: Sequence[Sequence[int]], home: Sequence[int]) -> dict[int, list[Pair]]:
    """shard → (row, expert, slot) in the order of the slots."""
    pairs: dict[int, list[Pair]] = {}
    for row, experts in enumerate(chosen):
        for k, expert in enumerate(experts):
            pairs.setdefault(home[expert], []).append((row, expert, row * len(experts) + k))
    return pairs


def pairs_of(shares: Sequence[ShardRows]) -> dict[int, list[Pair]]:
    """What :func:`by_loops` tells."""
    return {
        s.shard: list(zip(s.rows[s.pair_row].tolist(), s.pair_expert.tolist(), s.pair_slot.tolist(), strict=True))
        for s in shares
    }


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    n_experts, n_shards = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    k = draw(st.integers(1, n_experts))
    rows = draw(st.lists(st.permutations(range(n_experts)).map(lambda p: list(p[:k])), max_size=20))
    home = draw(st.lists(st.integers(0, n_shards - 1), min_size=n_experts, max_size=n_experts))
    return rows, home, n_shards


@given(batch=batches(), data=st.data())
def test_matches_the_loops_and_sends_each_row_once(
    batch: tuple[list[list[int]], list[int], int], data: st.DataObject
) -> None:
    """All slots, or some of them as when they are sent again; pairs without an owner are nobody's."""
    rows, home, _ = batch
    k = len(rows[0]) if rows else 1
    chosen, owners = np.array(rows, np.int64).reshape(-1, k), np.array(home, np.int64)
    picked = data.draw(st.lists(st.booleans(), min_size=chosen.size, max_size=chosen.size))
    dead = data.draw(st.sampled_from([-1, 0]))
    slots = np.flatnonzero(np.array(picked, bool))
    owner = owners[chosen.reshape(-1)[slots]]
    owner[owner == dead] = -1
    shares = split_rows(chosen, slots, owner)
    kept = {
        shard: mine
        for shard, pairs in by_loops(rows, home).items()
        if shard != dead and (mine := [pair for pair in pairs if picked[pair[2]]])
    }
    assert pairs_of(shares) == kept
    for share in shares:
        assert len(set(share.rows.tolist())) == share.rows.size


SPLITS = pytest.mark.parametrize("split", [dispatch_rows, dispatch_rows_by_numpy])
Split = Callable[..., list[ShardRows]]


@SPLITS
@given(batch=batches(), turn=st.integers(0, 6), data=st.data())
def test_all_pairs_of_a_batch_go_to_replicas_in_turn_and_are_counted(
    split: Split, batch: tuple[list[list[int]], list[int], int], turn: int, data: st.DataObject
) -> None:
    """Experts have no, one or several live shards."""
    rows, home, shards = batch
    live = [data.draw(st.permutations(range(shards)))[: data.draw(st.integers(0, shards))] for _ in home]
    table = np.full((len(home), shards), NOBODY)
    for expert, numbers in enumerate(live):
        table[expert, : len(numbers)] = numbers
    owners = Owners(table, np.array([len(numbers) for numbers in live]))
    chosen, load = np.array(rows, np.int64).reshape(-1, len(rows[0]) if rows else 1), np.full(len(home), 5)
    shares = split(chosen, owners, turn, load)
    owner = [numbers[(turn + e) % len(numbers)] if numbers else NOBODY for e, numbers in enumerate(live)]
    want = by_loops(rows, owner)
    want.pop(NOBODY, None)
    assert pairs_of(shares) == want
    assert load.tolist() == [5 + sum(row.count(expert) for row in rows) for expert in range(len(home))]


@SPLITS
@pytest.mark.parametrize("expert", [-1, 3])
def test_an_expert_that_is_none_is_an_error_and_nothing_is_counted(split: Split, expert: int) -> None:
    load = np.zeros(3, np.int64)
    owners = Owners(np.zeros((3, 1), np.int64), np.ones(3, np.int64))
    with pytest.raises(ValueError, match=f"experts from {min(expert, 2)} to {max(expert, 2)} .* there are 0 to 2"):
        split(np.array([[2, expert]]), owners, 0, load)
    assert not load.any()
