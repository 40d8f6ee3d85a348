"""Where single tokens of single rows lie in a batch of logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def cells(field: str, ids: Sequence[Collection[int]], n_vocab: int) -> np.ndarray:
    """Positions in ``logits [R, V].view(-1)`` of the ids of each of R rows: int64 [N], row after row.

    An ``array("q")`` or an int64 numpy array is read where it lies; other collections are converted, some 10 ns an
    id. ValueError that names ``field`` when an id is not below ``n_vocab``: it would hit another row.
    """
    if not any(map(len, ids)):
        return np.empty(0, dtype=np.int64)
    flat = np.concatenate([_array(row) for row in ids])
    if flat.min() < 0 or flat.max() >= n_vocab:
        wrong = flat[(flat < 0) | (flat >= n_vocab)][0]
        raise ValueError(f"{field}: token id {wrong}, allowed are 0 to {n_vocab - 1}")
    return flat + np.repeat(np.arange(len(ids)) * n_vocab, [len(row) for row in ids])


def _array(ids: Collection[int]) -> np.ndarray:
    return np.asarray(ids if isinstance(ids, Sequence | np.ndarray) else tuple(ids), dtype=np.int64)
