"""Quantised matrices of a checkpoint, whatever format they are stored in."""

from __future__ import annotations

import torch

from actors.model.errors import CheckpointError
from actors.model.weights import Checkpoint

from .packed_formats import read_awq, read_gptq, read_pack_quantized
from .qtensor import SCALES, QTensor
from .scheme import QuantScheme

MARKS = {
    "fp8": ("weight_scale_inv",),
    "compressed-tensors": ("weight_scale", "weight_packed"),
    "gptq": ("qweight",),
    "awq": ("qweight",),
}
"""Of these parts (instead of ``weight`` or beside it) a quantised matrix has at least one."""

PACKED = {
    "compressed-tensors": ("weight_packed", read_pack_quantized),
    "gptq": ("qweight", read_gptq),
    "awq": ("qweight", read_awq),
}
"""The part that holds the packed numbers, and what reads it."""


def is_quantized(checkpoint: Checkpoint, scheme: QuantScheme, name: str) -> bool:
    """Whether the matrix ``name`` (``X.weight``) is stored quantised: the parts that are there tell, not its name."""
    base = name.removesuffix(".weight")
    return any(checkpoint.has(f"{base}.{mark}") for mark in MARKS[scheme.method])


def read_quantized(checkpoint: Checkpoint, scheme: QuantScheme, name: str, shape: tuple[int, int]) -> QTensor | None:
    """The matrix ``name`` (``X.weight``, [N, K] = ``shape``) on the CPU, None if it is stored plain.

    Raises CheckpointError, naming the tensor and what was expected, for a part that is absent or of the wrong shape or
    dtype, for fp8 and int8 weights without a scale, and for numbers that are out of range.
    """
    base = name.removesuffix(".weight")
    if not is_quantized(checkpoint, scheme, name):
        if checkpoint.has(name) and checkpoint.dtype(name).itemsize == 1:
            marks = " or ".join(f"{base}.{mark}" for mark in MARKS[scheme.method])
            raise CheckpointError(
                f"tensor {name!r} is {checkpoint.dtype(name)}, but there is no {marks} for it: "
                f"expected that, or weights in one of {', '.join(map(str, SCALES))}"
            )
        return None
    if scheme.method in PACKED:
        part, read = PACKED[scheme.method]
        if checkpoint.has(f"{base}.{part}"):
            return read(checkpoint, scheme, base, shape)
    plain = _read_fp8 if scheme.method == "fp8" else _read_int8
    return plain(checkpoint, scheme, base, shape)


def _read_fp8(checkpoint: Checkpoint, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> QTensor:
    """DeepSeek-V3: a scale for every block of 128 x 128, cut off at the edges. Here each row gets the scales of its
    block: cuts and stacking need not know where blocks begin."""
    high, wide = scheme.block
    blocks = (-(-shape[0] // high), -(-shape[1] // wide))
    data = checkpoint.read_raw(f"{base}.weight", shape, (torch.float8_e4m3fn,))
    scale = checkpoint.read_raw(f"{base}.weight_scale_inv", blocks, SCALES)
    return QTensor("fp8", data, scale.repeat_interleave(high, 0)[: shape[0]].contiguous(), wide)


def _read_int8(checkpoint: Checkpoint, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> QTensor:
    """compressed-tensors' int-quantized."""
    group = scheme.group_size or shape[1]
    groups = (shape[0], -(-shape[1] // group))
    data = checkpoint.read_raw(f"{base}.weight", shape, (torch.int8,))
    scale = checkpoint.read_raw(f"{base}.weight_scale", groups, SCALES)
    zero = None
    if not scheme.symmetric:
        zero = checkpoint.read_raw(f"{base}.weight_zero_point", groups, (torch.int8,))
    return QTensor("int8", data, scale, group, zero, int8_activations=scheme.int8_activations)
