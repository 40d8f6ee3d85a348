"""Which rows go to which expert shard, and where their results belong. Pure index arithmetic, no wires."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.native import dispatch
from actors.native.library import library

NOBODY = -1
"""Owner of a pair whose expert no live shard holds."""


class ShardRows(NamedTuple):
    """What one shard gets of a batch: each row once, with the list of its (row, expert) pairs.

    ``rows`` int64[R]: indices into the batch, ascending. ``pair_row`` int32[P]: index into ``rows``.
    ``pair_expert`` int32[P]. ``pair_slot`` int64[P]: where the pair's result goes in the flat [T * K, D] output.
    """

    shard: int
    rows: NDArray[np.int64]
    pair_row: NDArray[np.int32]
    pair_expert: NDArray[np.int32]
    pair_slot: NDArray[np.int64]


class Owners:
    """Who computes the experts of one layer.

    ``shards`` int64[E, R]: each expert's live shards by number, the rest NOBODY; ``live`` int64[E]: how many they are.
    """

    def __init__(self, shards: NDArray[np.int64], live: NDArray[np.int64]) -> None:
        self.shards = np.ascontiguousarray(shards, np.int64)
        self.live = np.ascontiguousarray(live, np.int64)
        self.places = (dispatch.address(self.shards), dispatch.address(self.live), self.shards.shape[1])
        """Both addresses, and R: what the kernels take."""

    def of(self, experts: NDArray[np.int64], turn: int) -> NDArray[np.int64]:
        """int64[S]: number of the shard that computes each of ``experts`` int64[S], NOBODY where there is none.

        All pairs of a batch with the same expert go to one shard, so that its weights are read once; from one
        ``turn`` to the next an expert's replicas take turns, which spreads its load evenly over them.
        """
        return self.shards[experts, (turn + experts) % np.maximum(self.live[experts], 1)]


def dispatch_rows(chosen: NDArray[np.int64], owners: Owners, turn: int, load: NDArray[np.int64]) -> list[ShardRows]:
    """Split all pairs of a batch among the shards that compute them in this ``turn``, and count them.

    ``chosen`` int64[T, K]: experts of each row. ``load`` int64[E]: one is added for each pair of an expert. Pairs of
    nobody are in no result. Raises ValueError for an expert that is none of ``load``'s.
    """
    if library() is not None:
        return [ShardRows(*share) for share in dispatch.dispatch(chosen, *owners.places, load, turn)]
    return dispatch_rows_by_numpy(chosen, owners, turn, load)


def dispatch_rows_by_numpy(
    chosen: NDArray[np.int64], owners: Owners, turn: int, load: NDArray[np.int64]
) -> list[ShardRows]:
    """:func:`dispatch_rows` where the kernels are not built."""
    experts = chosen.reshape(-1)
    if experts.size and not 0 <= experts.min() <= experts.max() < load.size:
        raise ValueError(f"experts from {experts.min()} to {experts.max()} were chosen; there are 0 to {load.size - 1}")
    load += np.bincount(experts, minlength=load.size)
    return split_rows(chosen, np.arange(experts.size), owners.of(experts, turn))


def split_rows(chosen: NDArray[np.int64], slots: NDArray[np.int64], owner: NDArray[np.int64]) -> list[ShardRows]:
    """Split some pairs of a batch among the shards that compute them.

    ``chosen`` int64[T, K]: experts of each row. ``slots`` int64[S], ascending: indices into the flat ``chosen``.
    ``owner`` int64[S]: the shard's number for each slot, or less than 0 for a pair that nobody can compute now. Every
    slot with an owner is in exactly one result.
    """
    k = chosen.shape[1]
    experts = chosen.reshape(-1)[slots]
    result = []
    for shard in np.unique(owner).tolist():
        if shard < 0:
            continue
        mine = owner == shard
        slot = slots[mine]
        row = slot // k  # ascending, as the slots are
        first = np.diff(row, prepend=-1) > 0
        pair_row = np.cumsum(first, dtype=np.int32) - np.int32(1)
        result.append(ShardRows(shard, row[first], pair_row, experts[mine].astype(np.int32), slot))
    return result
