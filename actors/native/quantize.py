"""int4 weights out of floating ones, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import library
from .matrix import KINDS


def usable(weight: Tensor) -> bool:
    """Whether :func:`quantize_int4` takes it: fp32 or bf16, on the CPU, where the kernels are built."""
    return weight.device.type == "cpu" and weight.dtype in KINDS and library() is not None


def quantize_int4(weight: Tensor, data: Tensor, scale: Tensor, zero: Tensor) -> None:
    """A :func:`usable` weight [N, K] becomes ``data`` uint8 [N, K / 2], ``scale`` bf16 and ``zero`` uint8 (eighths of a
    step), both [N, ceil(K / 32)], all contiguous: what :func:`actors.model.quant.quantize.quantize` says of int4."""
    kernels = library()
    assert kernels is not None
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    kernels.quantize_int4(
        kernels.number,
        KINDS[weight.dtype],
        weight.data_ptr(),
        data.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        *weight.shape,
        weight.stride(0),
        torch.get_num_threads(),
    )
