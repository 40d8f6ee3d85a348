"""Quantised matrices of a checkpoint, whatever format they are stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.model.errors import CheckpointError
from actors.model.weights import Checkpoint
from actors.quant_kind import NumberKind

from .layout import Part, Parts, groups_of, quantized_parts
from .packed_formats import read_awq, read_gptq, read_order, read_pack_quantized, read_part
from .qtensor import SCALES, QTensor
from .scheme import QuantScheme

PACKED = {"weight_packed": read_pack_quantized, "gptq": read_gptq, "awq": read_awq}
"""What reads packed numbers, by method or by the part that holds them."""


def read_quantized(checkpoint: Checkpoint, scheme: QuantScheme, name: str, shape: tuple[int, int]) -> QTensor | None:
    """The matrix ``name`` (``X.weight``, [N, K] = ``shape``) on the CPU, None if it is stored plain.

    Raises CheckpointError, naming file, tensor and what was expected, for a part that is absent or of the wrong shape
    or dtype, for what :func:`quantized_parts` refuses, and for numbers that are out of range.
    """
    parts = quantized_parts(checkpoint, scheme, name, shape)
    if parts is None:
        return None
    if scheme.method == "fp8":
        return _read_fp8(checkpoint, scheme, parts, shape)
    if "weight" in parts:
        return _read_naive(checkpoint, scheme, parts, shape)
    return PACKED["weight_packed" if "weight_packed" in parts else scheme.method](checkpoint, scheme, parts, shape)


def _read_fp8(checkpoint: Checkpoint, scheme: QuantScheme, parts: Parts, shape: tuple[int, int]) -> QTensor:
    """DeepSeek-V3. Each row gets the scales of its block: cuts and stacking need not know where blocks begin."""
    high, wide = scheme.block
    data = read_part(checkpoint, parts["weight"])
    scale = _read_scale(checkpoint, parts["weight_scale_inv"])
    return QTensor("fp8", data, scale.repeat_interleave(high, 0)[: shape[0]].contiguous(), wide)


def _read_naive(checkpoint: Checkpoint, scheme: QuantScheme, parts: Parts, shape: tuple[int, int]) -> QTensor:
    """compressed-tensors' int-quantized and float-quantized."""
    group, groups = groups_of(scheme, shape[1])
    data = read_part(checkpoint, parts["weight"])
    scale = _read_scale(checkpoint, parts["weight_scale"])
    if scheme.one_scale:
        scale = scale.expand(shape[0], groups).contiguous()
    zero = None if scheme.symmetric else read_part(checkpoint, parts["weight_zero_point"])
    columns = read_order(checkpoint, parts, "weight_g_idx", group)
    if columns is not None:
        if scheme.int8_activations:
            name = parts["weight_g_idx"].name
            raise CheckpointError(
                f"{checkpoint.file(name)}: tensor {name!r} orders the columns, expected them in order with int8 "
                "activations"
            )
        data = data.view(torch.uint8)[:, columns].view(data.dtype)
    kind: NumberKind = "fp8" if scheme.floating else "int8"
    return QTensor(kind, data, scale, group, zero, columns, row_group=shape[1] if scheme.int8_activations else 0)


def _read_scale(checkpoint: Checkpoint, part: Part) -> Tensor:
    """As it is stored; exponents (e8m0) as fp32."""
    scale = read_part(checkpoint, part)
    return scale if scale.dtype in SCALES else scale.float()
