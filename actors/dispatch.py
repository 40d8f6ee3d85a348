"""Which rows go to which expert shard, and where their results belong. Pure index arithmetic, no wires."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.native import dispatch
from actors.native.library import library


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


def split_rows(chosen: NDArray[np.int64], slots: NDArray[np.int64], owner: NDArray[np.int64]) -> list[ShardRows]:
    """Split the pairs at ``slots`` of a batch among the shards that compute them.

    ``chosen`` int64[T, K]: experts of each row. ``slots`` int64[S], ascending: indices into the flat ``chosen``; all
    of them at first, those that have to be sent again later. ``owner`` int64[S]: the shard's number for each slot, or
    less than 0 for a pair that nobody can compute now. Every slot with an owner is in exactly one result.
    """
    if library() is not None:
        return [ShardRows(*share) for share in dispatch.split(chosen, slots, owner)]
    return split_rows_by_numpy(chosen, slots, owner)


def split_rows_by_numpy(
    chosen: NDArray[np.int64], slots: NDArray[np.int64], owner: NDArray[np.int64]
) -> list[ShardRows]:
    """:func:`split_rows` where the kernels are not built."""
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
