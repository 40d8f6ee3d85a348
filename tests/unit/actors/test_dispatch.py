"""Splitting a batch among shards, against plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.dispatch import ShardRows, split_rows, split_rows_by_numpy

Pair = tuple[int, int, int]


def by_loops(chosen: Sequence[Sequence[int]], home: Sequence[int]) -> dict[int, list[Pair]]:
    """shard → (row, expert, slot) in the order of the slots."""
    pairs: dict[int, list[Pair]] = {}
    for row, experts in enumerate(chosen):
        for k, expert in enumerate(experts):
            pairs.setdefault(home[expert], []).append((row, expert, row * len(experts) + k))
    return pairs


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    n_experts, n_shards = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    k = draw(st.integers(1, n_experts))
    rows = draw(st.lists(st.permutations(range(n_experts)).map(lambda p: list(p[:k])), max_size=20))
    home = draw(st.lists(st.integers(0, n_shards - 1), min_size=n_experts, max_size=n_experts))
    return rows, home, n_shards


@pytest.mark.parametrize("split", [split_rows, split_rows_by_numpy])
@given(batch=batches(), data=st.data())
def test_matches_the_loops_and_sends_each_row_once(
    split: Callable[..., list[ShardRows]], batch: tuple[list[list[int]], list[int], int], data: st.DataObject
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
    shares = split(chosen, slots, owner)
    got = {
        s.shard: list(zip(s.rows[s.pair_row].tolist(), s.pair_expert.tolist(), s.pair_slot.tolist(), strict=True))
        for s in shares
    }
    kept = {
        shard: mine
        for shard, pairs in by_loops(rows, home).items()
        if shard != dead and (mine := [pair for pair in pairs if picked[pair[2]]])
    }
    assert got == kept
    for share in shares:
        assert len(set(share.rows.tolist())) == share.rows.size
