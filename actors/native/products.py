"""Products of rows with weights on the CPU, whose results for a row depend on that row alone.

Each output is a sum in one fixed order, whatever the number of rows, of threads and of columns: these kernels serve the
deterministic mode as they are. Weights are read where they lie, [N, K], once for a few rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import library

KINDS = {torch.float32: 0, torch.bfloat16: 1}


def usable(x: Tensor, *weights: object) -> bool:
    """Whether the kernels take rows x [R, K] and these weights: dense, on the CPU, of one dtype, fp32 or bf16."""
    if x.device.type != "cpu" or x.dtype not in KINDS or library() is None:
        return False
    return all(isinstance(w, Tensor) and w.dtype == x.dtype and w.is_contiguous() for w in weights)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [R, K], weight [N, K], bias [N], all :func:`usable`; returns [R, N]."""
    kernels = library()
    assert kernels is not None
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    out = x.new_empty(rows, weight.shape[0])
    kernels.linear(
        kernels.number,
        KINDS[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        k,
        weight.shape[0],
        x.stride(0),
        torch.get_num_threads(),
    )
    return out


def experts(
    x: Tensor, pair_row: Tensor, pair_expert: Tensor, gate_up: Tensor, down: Tensor, inter: int
) -> Tensor | int:
    """SwiGLU experts. x: [R, D]; pair_row, pair_expert: int [P], pair p sends row ``pair_row[p]`` to expert
    ``pair_expert[p]``; gate_up, down: int64 [E], the addresses of the experts' [2 inter, D] and [D, inter], 0 where one
    is not held. Returns [P, D], or the number of an expert that is not held. Raises IndexError for a row that x lacks.
    """
    kernels = library()
    assert kernels is not None
    x = x.contiguous()
    pair_row, pair_expert = pair_row.to(torch.int64).contiguous(), pair_expert.to(torch.int64).contiguous()
    out = x.new_empty(pair_row.shape[0], x.shape[1])
    wrong: int = kernels.experts(
        kernels.number,
        KINDS[x.dtype],
        x.data_ptr(),
        pair_row.data_ptr(),
        pair_expert.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        pair_row.shape[0],
        x.shape[1],
        inter,
        gate_up.shape[0],
        torch.get_num_threads(),
    )
    pairs = pair_row.shape[0]
    if wrong >= pairs:
        raise IndexError(f"pair {wrong - pairs} has index {int(pair_row[wrong - pairs])}; there are {x.shape[0]} rows")
    return out if wrong < 0 else int(pair_expert[wrong])
