"""Quantise a matrix when it is loaded, without calibration data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.native import quantize as native
from actors.quant_kind import NUMBERS, QUANT_KINDS, NumberKind, QuantKind

from .packing import pack_nibbles
from .qtensor import DATA, ZERO_PARTS, QTensor

GROUP: dict[NumberKind, int] = {"int8": 128, "int4": 32, "fp8": 128}
"""Columns that share a scale."""

ROW_GROUP = 128
"""Columns of a row that share a scale where rows are quantised."""

TOP: dict[NumberKind, float] = {"int8": 127.0, "int4": 15.0, "fp8": 448.0}
"""The largest number."""

_TOP4 = TOP["int4"]

TILE_BYTES = 1024 * 1024
"""Of fp32 that are worked on at once: small enough to stay in a cache, and several threads do it at the same time."""

_SHRUNK = ((1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.9, 0.9))
"""Parts of an int4 group's range that are tried, below and above 0."""

_LOWEST = (-7, -8)
"""Of the symmetric ranges of an int4 group that are tried: up to 7."""

_EQUAL = 1 + 2**-18
"""What an int4 group's fits meet is the same up to this factor."""

TINY = torch.finfo(torch.bfloat16).tiny
"""No scale is smaller: dividing by a subnormal one is not safe on every device."""


def quantize(weight: Tensor, kind: QuantKind) -> QTensor:
    """``weight`` (floating [N, K]) as ``kind``: int8 symmetric in groups of 128 columns of a row, int4 with a zero
    point in groups of 32, fp8 (e4m3) in groups of 128. Scales are bf16. ``w8a8`` and ``w4a8`` are the same numbers as
    int8 and int4, for rows that are quantised to int8 with a scale for 128 columns.

    int8 and fp8: an element is off by half a step of its group at most (fp8: half a unit in the last place); scales are
    rounded up so that a group's largest element is still within range. Measured on normal weights, fp32 scales would
    make the error 0.8 % smaller (fp8: 0.1 %); the same bytes spent on half the group, 8 % (fp8: 2 %). int4: a group's
    numbers are rounded to 16 steps six times: over its range, over 90 % of it on either side and on both with what is
    beyond cut off, and to -7 .. 7 and -8 .. 7, as weights trained for 4 bits lie; each time step and zero point (in
    eighths of a step) are fitted to the numbers (least squares), and the best is rounded and fitted once more. On
    normal weights the error is 7.1 % of the weights; with the whole range alone it is 8.0 %, with 16 ranges and four
    times as much time 7.0 %. Weights that are 4-bit numbers with a scale for each group stay as they are but for the
    scale's rounding. A 0 may otherwise be off by half a step as any other number. A group with NaN or infinity becomes
    NaN or infinity. Raises ValueError for an odd K with int4, and for what is not a floating matrix.
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
    if made.zero is not None and native.usable(weight):
        native.quantize_int4(weight, made.data, made.scale, made.zero)
        return made
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
    """int4: (bf16 scales, zero points in parts [n, groups], numbers [n, groups, group]), the latter two in fp32."""
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    # Divided first: the span of the largest numbers overflows.
    whole = (high / _TOP4 - low / _TOP4).clamp(min=TINY)
    steps = grouped / whole[..., None]
    least = TINY / whole
    low, high = low / whole, high / whole
    ranges = [(low * below, high * above) for below, above in _SHRUNK]
    for lowest in _LOWEST:
        step = torch.maximum(high / 7, low / lowest)
        ranges.append((-8 * step, 7 * step))
    best = None
    for bottom, top in ranges:
        best = _better(best, _fitted(steps, (top - bottom) / _TOP4, -bottom, least))
    assert best is not None
    _, fit, zero = _better(best, _fitted(steps, best[1], best[2] * best[1], least))
    scale = (fit * whole).clamp(min=TINY).to(torch.bfloat16)
    return scale, zero * ZERO_PARTS["int4"], _numbers(grouped, scale.float(), zero)


def _better(one: list[Tensor] | None, other: list[Tensor]) -> list[Tensor]:
    """For each group the one that meets more; one within the sums' rounding, so that their order does not decide."""
    if one is None:
        return other
    more = other[0] > one[0] * _EQUAL
    return [torch.where(more, theirs, ours) for theirs, ours in zip(other, one, strict=True)]


def _fitted(values: Tensor, scale: Tensor, low: Tensor, least: Tensor) -> list[Tensor]:
    """``values`` [n, groups, group] are rounded to 16 steps of ``scale`` from -``low`` on, and scale, no less than
    ``least`` (all [n, groups]), and zero point are fitted to those numbers (least squares).

    Returns [how much of a group's sum of squares is met, scale, zero point in steps], each [n, groups]. Everything is
    fp32 and in the same unit, of which a group's values span 15 at most, so that no square overflows.
    """
    count, parts = values.shape[-1], ZERO_PARTS["int4"]
    scale = torch.maximum(scale, least)
    first = low / scale
    numbers = _numbers(values, scale, first)
    total, squares, summed = numbers.sum(-1), numbers.square().sum(-1), values.sum(-1)
    overlap = numbers.mul_(values).sum(-1)
    # With a zero point z and a scale s the error is the sum of (values - s * (numbers - z)) ** 2.
    spread = count * squares - total.square()
    slope = (count * overlap - total * summed) / spread
    zero = torch.where((spread > 0) & (slope > 0), (total - summed / slope) / count, first)
    zero = (zero * parts).clamp_(0, _TOP4 * parts).round_() / parts
    overlap = overlap - zero * summed
    squares = squares - zero * (2 * total - count * zero)
    fit = torch.maximum(torch.where(squares > 0, overlap / squares, scale), least)
    return [fit * (2 * overlap - fit * squares), fit, zero]


def _numbers(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """int4 numbers."""
    return (values / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, _TOP4)
