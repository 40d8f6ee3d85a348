"""Products of rows with weights on the CPU, whose results for a row depend on that row alone.

Each output is a sum in one fixed order, whatever the number of rows, of threads and of columns: these kernels serve the
deterministic mode as they are. Weights are read where they lie, [N, K], once for a few rows; quantised ones become fp32
on the way, ``(number - zero) * scale``, and nothing else is rounded before the result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .library import library
from .matrix import NOWHERE, Place, Quantised, place, row_kind, weight_kind

Weight = Tensor | Quantised

_Place = ctypes.c_int64 * len(Place._fields)


def usable(x: Tensor, *weights: Weight) -> bool:
    """Whether the kernels multiply rows x [R, K] (fp32 or bf16, on the CPU) with each of these weights."""
    if x.device.type != "cpu" or row_kind(x.dtype) is None or library() is None:
        return False
    return all(weight_kind(weight, x.dtype) is not None for weight in weights)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [R, K], weight [N, K], both :func:`usable`, bias [N] as x; returns [R, N] as x."""
    kernels = library()
    assert kernels is not None
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    out = x.new_empty(rows, weight.shape[0])
    kernels.linear(
        kernels.number,
        row_kind(x.dtype),
        weight_kind(weight, x.dtype),
        x.data_ptr(),
        _Place(*place(weight)),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        k,
        weight.shape[0],
        x.stride(0),
        torch.get_num_threads(),
    )
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """Where a SwiGLU's gate, up [I, D] and down [D, I] lie, and of what kind they are: gate and up of one, in their
    order. ``dtype``: of the rows that it takes, None: any."""

    places: tuple[Place, Place, Place]
    kinds: tuple[int, int]
    inter: int
    dtype: torch.dtype | None



def experts(
    x: Tensor, pair_row: Tensor, pair_expert: Tensor, gate_up: Tensor, down: Tensor, inter: int
) -> Tensor | int:
    raise NotImplementedError
