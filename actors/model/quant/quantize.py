"""Quantise a matrix when it is loaded, without calibration data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.quant_kind import NUMBERS, QUANT_KINDS, NumberKind, QuantKind

from .packing import pack_nibbles
from .qtensor import DATA, QTensor

GROUP: dict[NumberKind, int] = {"int8": 128, "int4": 32, "fp8": 128}
"""Columns that share a scale."""

ROW_GROUP = 128
"""Columns of a row that share a scale where rows are quantised."""

TOP: dict[NumberKind, float] = {"int8": 127.0, "int4": 15.0, "fp8": 448.0}
"""The largest number."""

TILE_BYTES = 1024 * 1024
"""Of fp32 that are worked on at once: small enough to stay in a cache, and several threads do it at the same time."""

SHRUNK = (1.0, 0.94)
"""Parts of an int4 group's range that are tried: the best pair on normal weights."""

TINY = torch.finfo(torch.bfloat16).tiny
"""No scale is smaller: dividing by a subnormal one is not safe on every device."""


def quantize(weight: Tensor, kind: QuantKind) -> QTensor:
    """``weight`` (floating [N, K]) as ``kind``: int8 symmetric in groups of 128 columns of a row, int4 with a zero
    point in groups of 32, fp8 (e4m3) in groups of 128. Scales are bf16. ``w8a8`` and ``w4a8`` are the same numbers as
    int8 and int4, for rows that are quantised to int8 with a scale for 128 columns.

    int8 and fp8: an element is off by half a step of its group at most (fp8: half a unit in the last place); scales are
    rounded up so that a group's largest element is still within range. Measured on normal weights, fp32 scales would
    make the error 0.8 % smaller (fp8: 0.1 %); the same bytes spent on half the group, 8 % (fp8: 2 %). int4: the group's
    range, and 94 % of it with what is beyond cut off, are each rounded to 16 steps, then the step is fitted to those
    numbers (least squares); the one with the smaller squared error stays. On normal weights that error is 7 % smaller
    than with the whole range alone (its root 3.6 %), and quantising takes twice as long; with 36 ranges it would be
    8 %. A group with NaN or infinity becomes NaN or infinity. Raises ValueError for an odd K with int4, and for what is
    not a floating matrix.
    """
    if kind not in QUANT_KINDS:
        raise ValueError(f"kind is {kind!r}: allowed is one of {', '.join(QUANT_KINDS)}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}: allowed is a floating [N, K]")
    rows, width = weight.shape
    if NUMBERS[kind] == "int4" and width % 2:
        raise ValueError(f"weight has {width} columns: allowed is an even number (int4 packs two in a byte)")
    made = _blank((rows, width), kind, weight.device)
    kept = made.kind
    height = max(1, TILE_BYTES // (4 * max(1, width)))
    for start in range(0, rows, height):
        tile = slice(start, start + height)
        grouped = _in_groups(weight[tile].float(), made.group)
        if made.zero is None:
            made.scale[tile], numbers = _symmetric(grouped, kept)
        else:
            made.scale[tile], made.zero[tile], numbers = _affine(grouped)
        flat = numbers.flatten(1)[:, :width].to(DATA[kept])
        made.data[tile] = pack_nibbles(flat) if kept == "int4" else flat
    return made


def quantized_bytes(shape: tuple[int, int], kind: QuantKind) -> int:
    """Bytes of what :func:`quantize` makes of a matrix [N, K]."""
    return _blank(shape, kind, torch.device("meta")).nbytes


def _blank(shape: tuple[int, int], kind: QuantKind, device: torch.device) -> QTensor:
    rows, width = shape
    kept = NUMBERS[kind]
    groups = (rows, -(-width // GROUP[kept]))
    data = torch.empty((rows, width // 2 if kept == "int4" else width), dtype=DATA[kept], device=device)
    zero = torch.empty(groups, dtype=torch.uint8, device=device) if kept == "int4" else None
    scale = torch.empty(groups, dtype=torch.bfloat16, device=device)
    return QTensor(kept, data, scale, GROUP[kept], zero, row_group=0 if kept == kind else ROW_GROUP)


def _in_groups(tile: Tensor, group: int) -> Tensor:
    """[n, K] -> [n, groups, group], the last one filled up with zeros: they widen no range, as each includes 0."""
    return F.pad(tile, (0, -tile.shape[1] % group)).unflatten(1, (-1, group))


def _symmetric(grouped: Tensor, kind: NumberKind) -> tuple[Tensor, Tensor]:
    """(bf16 scales [n, groups], numbers [n, groups, group] in fp32, fp8 not rounded yet)."""
    step = grouped.abs().amax(-1) / TOP[kind]
    nearest = step.to(torch.bfloat16)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    scale = torch.where(nearest.float() < step, above, nearest).clamp(min=TINY)
    steps = grouped / scale[..., None].float()
    return scale, (steps if kind == "fp8" else steps.round_()).clamp_(-TOP[kind], TOP[kind])


def _affine(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int4: (bf16 scales, zero points [n, groups], numbers [n, groups, group]), the latter two in fp32."""
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    best = _fitted(grouped, low, high, SHRUNK[0])
    for part in SHRUNK[1:]:
        other = _fitted(grouped, low, high, part)
        better = other[0] > best[0]
        best = [torch.where(better, theirs, ours) for theirs, ours in zip(other, best, strict=True)]
    _, step, zero, scale = best
    return scale.to(torch.bfloat16), zero, _numbers(grouped / step[..., None], zero).add_(zero[..., None])


def _fitted(grouped: Tensor, low: Tensor, high: Tensor, part: float) -> list[Tensor]:
    """[how much of a group's sum of squares is met, in steps of its whole range; step to round with; zero point; scale]
    of 16 steps over ``part`` of the range low..high, all fp32 [n, groups]."""
    top = TOP["int4"]
    # Divided first: the span of the largest numbers overflows.
    whole = (high / top - low / top).clamp(min=TINY)
    step = (whole * part).to(torch.bfloat16).clamp(min=TINY).float()
    zero = (-low * part / step).round_().clamp_(0, top)
    steps = grouped / step[..., None]
    numbers = _numbers(steps, zero)
    overlap, length = steps.mul_(numbers).sum(-1), numbers.square_().sum(-1)
    scale = torch.where(length > 0, step * (overlap / length), step).to(torch.bfloat16).clamp(min=TINY).float()
    fit = scale / step
    return [(step / whole).square() * fit * (2 * overlap - fit * length), step, zero, scale]


def _numbers(steps: Tensor, zero: Tensor) -> Tensor:
    """int4 numbers less their zero point."""
    zero = zero[..., None]
    return torch.maximum(torch.minimum(steps.round(), TOP["int4"] - zero), -zero)
