"""The router's work with pairs and rows in host memory: to split them among shards, and to combine what comes back."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .library import library
from .matrix import KINDS

Share = tuple[int, NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]
"""The fields of :class:`actors.dispatch.ShardRows`, in order."""

Placed = tuple[int, int, int]
"""Rows that lie together: the address of their slots, int64 [P], or 0 for 0, 1, ...; that of the rows [P, D]; P."""


def dispatch(
    chosen: NDArray[np.int64], shards: int, live: int, width: int, load: NDArray[np.int64], turn: int
) -> list[Share]:
    """See :func:`actors.dispatch.dispatch_rows`. ``chosen`` is contiguous and writable; ``shards`` and ``live``: the
    addresses of a table's, with ``width`` columns. Raises ValueError for an expert that ``load`` has no place for."""
    kernels, count = library(), chosen.size
    assert kernels is not None
    if not count:
        return []
    out = np.empty(6 * count, np.int64)  # rows, slots, three columns of a table; pair_row and pair_expert in one
    shares = kernels.dispatch(
        address(chosen), shards, live, address(load), address(out), count, chosen.shape[1], width, load.size, turn
    )
    if shares < 0:
        raise ValueError(f"experts from {chosen.min()} to {chosen.max()} were chosen; there are 0 to {load.size - 1}")
    slots, small = out[count : 2 * count], out[5 * count :].view(np.int32)
    table = out[2 * count : 2 * count + 3 * shares].tolist()
    result: list[Share] = []
    row = pair = 0
    for shard, rows, pairs in zip(table[::3], table[1::3], table[2::3], strict=True):
        mine, experts = slice(pair, pair + pairs), slice(count + pair, count + pair + pairs)
        result.append((shard, out[row : row + rows], small[mine], small[experts], slots[mine]))
        row, pair = row + rows, pair + pairs
    return result


def combines(rows: torch.dtype, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether :func:`combine` takes these: weights on the CPU, contiguous, not empty, each fp32 or bf16."""
    if not (weight.is_cpu and weight.is_contiguous() and weight.numel()) or library() is None:
        return False
    return rows in KINDS and weight.dtype in KINDS and dtype in KINDS


def combine(
    pieces: Sequence[Placed], rows: torch.dtype, columns: int, weight: Tensor, dtype: torch.dtype, into: int
) -> None:
    """See :func:`actors.model.combine.combine_rows`; what :func:`combines` took. The ``pieces`` hold every slot once,
    in ``columns`` numbers of dtype ``rows``; ``into``: the address of [T, D] of ``dtype``."""
    kernels = library()
    assert kernels is not None
    kernels.combine(
        kernels.number,
        KINDS[rows],
        KINDS[weight.dtype],
        KINDS[dtype],
        struct.pack(f"{3 * len(pieces)}q", *(number for piece in pieces for number in piece)),
        weight.data_ptr(),
        into,
        len(pieces),
        *weight.shape,
        columns,
        torch.get_num_threads(),
    )


def address(memory: Any) -> int:
    """Where a contiguous writable array or view that is not empty lies; half the time of ``array.ctypes.data``."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
