"""Products of rows with weights on the CPU, whose results for a row depend on that row alone.

Each output is a sum in one fixed order, whatever the number of rows, of threads and of columns: these kernels serve the
deterministic mode as they are. Weights are read where they lie, [N, K], once for a few rows; quantised ones become fp32
on the way, ``(number - zero) * scale``, and nothing else is rounded before the result. Where rows are to become int8
too (``row_group``), integers are multiplied: :mod:`actors.model.quant.int8_product` says what exactly.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .expert_places import ExpertPlaces
from .library import library
from .matrix import KINDS, Numbers, Quantised, Weight, place, takes, weight_kind


def usable(x: Tensor, *weights: Weight) -> bool:
    """Whether the kernels multiply rows x [R, K] (fp32 or bf16, on the CPU) with each of these weights."""
    if x.device.type != "cpu" or x.dtype not in KINDS or library() is None:
        return False
    return all(takes(weight, x.dtype) for weight in weights)


def adds(bias: Tensor | None, x: Tensor, weight: Weight) -> bool:
    """Whether :func:`linear` adds this bias to products of the two: contiguous [N] on the CPU, of the dtype of x."""
    if bias is None:
        return True
    return bias.is_cpu and bias.is_contiguous() and bias.dtype == x.dtype and bias.shape == weight.shape[:1]


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [R, K], weight [N, K], both :func:`usable`, a bias that it :func:`adds`; returns
    [R, N] as x. Raises ValueError where x has not K columns."""
    kernels = library()
    assert kernels is not None
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    if k != weight.shape[1]:
        raise ValueError(f"x has {k} columns, the weight {weight.shape[1]}")
    out = x.new_empty(rows, weight.shape[0])
    kernels.linear(
        kernels.number,
        KINDS[x.dtype],
        weight_kind(weight),
        x.data_ptr(),
        Numbers(*place(weight)),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        k,
        weight.shape[0],
        x.stride(0),
        torch.get_num_threads(),
    )
    return out


def dequantize(weight: Quantised, start: int, out: Tensor) -> None:
    """The rows from ``start`` on of a weight that the kernels take into ``out`` [n, K], contiguous, fp32 or bf16: as
    torch computes them in fp32, rounded once."""
    kernels = library()
    assert kernels is not None
    kernels.dequantize(
        kernels.number,
        KINDS[out.dtype],
        weight_kind(weight),
        Numbers(*place(weight, start)),
        out.data_ptr(),
        *out.shape,
        torch.get_num_threads(),
    )


def experts(x: Tensor, pair_row: Tensor, pair_expert: Tensor, places: ExpertPlaces) -> Tensor | int:
    """SwiGLU experts. x: [R, D], which ``places`` take; pair_row, pair_expert: int [P], pair p sends row
    ``pair_row[p]`` to expert ``pair_expert[p]``. Returns [P, D], unweighted, or the number of an expert that is not
    held. Raises IndexError for a row that x lacks, ValueError where x has not D columns.
    """
    kernels = library()
    assert kernels is not None
    if x.shape[1] != places.d_model:
        raise ValueError(f"x has {x.shape[1]} columns, the experts take {places.d_model}")
    x = x.contiguous()
    pair_row, pair_expert = pair_row.to(torch.int64).contiguous(), pair_expert.to(torch.int64).contiguous()
    out = x.new_empty(pair_row.shape[0], x.shape[1])
    wrong: int = kernels.experts(
        kernels.number,
        KINDS[x.dtype],
        *places.kinds,
        x.data_ptr(),
        pair_row.data_ptr(),
        pair_expert.data_ptr(),
        places.numbers,
        out.data_ptr(),
        x.shape[0],
        pair_row.shape[0],
        x.shape[1],
        places.inter,
        len(places),
        torch.get_num_threads(),
    )
    pairs = pair_row.shape[0]
    if wrong >= pairs:
        raise IndexError(f"pair {wrong - pairs} has index {int(pair_row[wrong - pairs])}; there are {x.shape[0]} rows")
    return out if wrong < 0 else int(pair_expert[wrong])


def swiglu(x: Tensor, places: ExpertPlaces) -> Tensor:
    """What :func:`experts` gives for every row of x [R, D] at expert 0; returns [R, D]."""
    out = experts(x, *_all_at_expert_0(x.shape[0]), places)
    assert isinstance(out, Tensor)
    return out


@lru_cache(64)
def _all_at_expert_0(rows: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
