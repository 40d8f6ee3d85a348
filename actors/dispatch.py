"""Which rows go to which expert shard, and where their results belong. Pure index arithmetic, no wires."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ShardRows:
    """What one shard gets of a batch: each row once, with the list of its (row, expert) pairs.

    ``rows`` int64[R]: indices into the batch, ascending. ``pair_row`` int32[P]: index into ``rows``.
    ``pair_expert`` int32[P]. ``pair_slot`` int64[P]: where the pair's result goes in the flat [T * K, D] output.
    """

    shard: int
    rows: NDArray[np.int64]
    pair_row: NDArray[np.int32]
    pair_expert: NDArray[np.int32]
    pair_slot: NDArray[np.int64]


def split_rows(chosen: NDArray[np.int64], home: NDArray[np.int64], n_shards: int) -> list[ShardRows]:
    """Split a batch among the shards that hold its experts.

    ``chosen`` int64[T, K]: experts of each row. ``home`` int64[E]: the shard's number for each expert of the layer.
    Shards that get nothing are absent. Every (row, k) is in exactly one result.
    """
    k = chosen.shape[1]
    flat = chosen.reshape(-1)
    owner = home[flat]
    result = []
    for shard in range(n_shards):
        slot = np.flatnonzero(owner == shard)
        if slot.size == 0:
            continue
        rows, pair_row = np.unique(slot // k, return_inverse=True)
        result.append(
            ShardRows(shard, rows, pair_row.astype(np.int32), flat[slot].astype(np.int32), slot.astype(np.int64))
        )
    return result
