"""Products of rows that are quantised to int8 as they come (W8A8, W4A8; dynamic): the kernels' in torch."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import unpack_nibbles
from .qtensor import MIDDLE, ZERO_PARTS, QTensor

STEPS = 127.5
"""Half of int8's range: compressed-tensors' divisor, whose largest element then rounds to 128 and is clamped to 127."""

EXACT_COLUMNS = 1024
"""int8 products over so many columns are integers <= 2**24, which fp32 adds exactly in any order."""

CUDA_MIN_ROWS = 32
"""torch._int_mm takes more than 16 rows alone there, and multiples of 8 for the other two extents."""


def int8_linear(x: Tensor, weight: QTensor) -> Tensor:
    """``dequantised(quantised(x)) @ dequantised(weight).T``. x: floating [R, K]; returns [R, N] in x's dtype.

    The integer products of a group of columns are exact; scales are applied in fp32, with one cast at the end: the
    weight's where groups are added that share a scale of the row, the row's to those sums. A row's result does not
    depend on the other rows. A row that holds NaN or infinity becomes NaN or infinity, the others do not.
    """
    weight = weight.in_rows()
    width, row_group = weight.shape[1], min(weight.row_group, weight.shape[1])
    rows, row_scale = quantize_rows(x, row_group)
    total, parts = x.new_zeros((), dtype=torch.float32), ZERO_PARTS[weight.kind]
    for index, start in enumerate(range(0, width, row_group)):
        part = x.new_zeros((), dtype=torch.float32)
        for first in range(start, min(start + row_group, width), weight.group):
            columns = slice(first, min(first + weight.group, width))
            whole, scale = _integers(rows[:, columns], weight, columns), weight.scale[:, first // weight.group]
            part = part + whole.float() * (scale.float() / parts)
        total = total + part * row_scale[:, index, None]
    return total.to(x.dtype)


def _integers(rows: Tensor, weight: QTensor, columns: slice) -> Tensor:
    """int8 rows [R, n] times columns of a weight, all of one group, in parts of a step: int32 [R, N]."""
    numbers = weight.data[:, columns] if weight.kind == "int8" else unpack_nibbles(weight.data)[:, columns]
    parts = ZERO_PARTS[weight.kind]
    zero = MIDDLE[weight.kind] * parts if weight.zero is None else weight.zero[:, columns.start // weight.group].int()
    whole = int_matmul(rows, numbers.to(torch.int8)) * parts
    return whole - rows.sum(-1, keepdim=True, dtype=torch.int32) * zero


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(int8 [R, K], fp32 scales [R, ceil(K / group)]) of rows [R, K] whose numbers share a scale in groups of columns:
    symmetric, scale = the largest magnitude / 127.5, ties to even.

    As compressed-tensors' dynamic strategies ``token`` and ``group`` have it (compute_dynamic_scales_and_zp), eps in
    the place of a scale of 0 included, but always in fp32: there, bf16 rows get bf16 scales and quotients.
    """
    groups = -(-x.shape[1] // group)
    values = F.pad(x.float(), (0, groups * group - x.shape[1])).unflatten(1, (groups, group))
    scale = values.abs().amax(-1) / STEPS
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    numbers = (values / scale[..., None]).round().clamp(-128, 127).to(torch.int8)
    return numbers.flatten(1)[:, : x.shape[1]], scale


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` exactly. a: int8 [R, K], b: int8 [N, K]; returns int32 [R, N]."""
    if a.device.type == "cpu" and cpu_is_exact():
        return torch._int_mm(a.contiguous(), b.T)
    if a.device.type == "cuda" and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0:
        padded = F.pad(a, (0, 0, 0, max(0, CUDA_MIN_ROWS - a.shape[0])))
        return torch._int_mm(padded, b.contiguous().T)[: a.shape[0]]
    return exact_matmul(a, b)


@cache
def cpu_is_exact() -> bool:
    """Whether this CPU multiplies int8 matrices exactly; looked at once.

    Without VNNI (AVX2, the first AVX-512) oneDNN adds up pairs of products in 16 bits, which saturate: 130,560 instead
    of 16,516,096 for 1024 times 127 * 127. Its kernels for one row alone do not.
    """
    rows, columns, width = 8, 96, 1024
    a = torch.full((rows, width), 127, dtype=torch.int8)
    wanted = 127 * 127 * width
    return all(
        bool((torch._int_mm(a, torch.full((columns, width), sign * 127, dtype=torch.int8).T) == sign * wanted).all())
        for sign in (1, -1)
    )


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """:func:`int_matmul` out of fp32 products, on any device and for any shape."""
    total = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    for start in range(0, a.shape[1], EXACT_COLUMNS):
        part = slice(start, start + EXACT_COLUMNS)
        total += F.linear(a[:, part].float(), b[:, part].float()).int()
    return total
