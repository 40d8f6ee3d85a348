"""The router's work with pairs and rows in host memory: to split them among shards, and to combine what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .library import library
from .matrix import KINDS

Share = tuple[int, NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]
"""The fields of :class:`actors.dispatch.ShardRows`, in order."""


def split(chosen: NDArray[np.int64], slots: NDArray[np.int64], owner: NDArray[np.int64]) -> list[Share]:
    """See :func:`actors.dispatch.split_rows`. All three are writable, and every slot is one of ``chosen``."""
    kernels = library()
    assert kernels is not None
    chosen, slots, owner = (np.ascontiguousarray(array, np.int64) for array in (chosen, slots, owner))
    count = slots.size
    out = np.empty(6 * count, np.int64)  # rows, slots, three columns of a table; pair_row and pair_expert in one
    shares = kernels.split(_at(chosen), _at(slots), _at(owner), count, chosen.shape[1], _at(out))
    small = out[5 * count :].view(np.int32)
    table = out[2 * count : 2 * count + 3 * shares].tolist()
    result: list[Share] = []
    row = pair = 0
    for shard, rows, pairs in zip(table[::3], table[1::3], table[2::3], strict=True):
        of_pairs, of_experts = slice(pair, pair + pairs), slice(count + pair, count + pair + pairs)
        result.append((shard, out[row : row + rows], small[of_pairs], small[of_experts], out[of_experts]))
        row, pair = row + rows, pair + pairs
    return result


def combines(out: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`combine` takes these: on the CPU, contiguous, not empty, each fp32 or bf16."""
    here = all(tensor.is_cpu and tensor.is_contiguous() for tensor in (out, weight))
    if not (here and out.numel()) or library() is None:
        return False
    return out.dtype in KINDS and weight.dtype in KINDS and dtype in KINDS


def combine(out: Tensor, weight: Tensor, dtype: torch.dtype, at: NDArray[np.int64], rows: Tensor) -> Tensor:
    """See :func:`actors.model.combine.combine_rows`; what :func:`combines` took. ``rows`` [P, D] contiguous, of the
    dtype of ``out``. ``at`` int64[P]: writable, every slot is one of ``out``."""
    kernels = library()
    assert kernels is not None
    tokens, k, d = out.shape
    into = torch.empty(tokens, d, dtype=dtype)
    kernels.combine(
        kernels.number,
        KINDS[out.dtype],
        KINDS[weight.dtype],
        KINDS[dtype],
        out.data_ptr(),
        rows.data_ptr(),
        _at(at),
        weight.data_ptr(),
        into.data_ptr(),
        tokens,
        k,
        d,
        at.size,
        torch.get_num_threads(),
    )
    return into


def _at(array: NDArray[Any]) -> int:
    return torch.from_numpy(array).data_ptr()  # half the time of array.ctypes.data
