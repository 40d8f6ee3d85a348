"""Of which tensors a quantised matrix consists on disk, by format: names, shapes and dtypes, without reading any.

What reads them takes them from here, and so does whoever looks at headers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actors.model.dtypes import COMPUTED as SCALES
from actors.model.dtypes import ITEM_BYTES, shown
from actors.model.errors import CheckpointError

from .scheme import QuantMethod, QuantScheme

MARKS: dict[QuantMethod, tuple[str, ...]] = {
    "fp8": ("weight_scale_inv",),
    "compressed-tensors": ("weight_scale", "weight_packed"),
    "gptq": ("qweight",),
    "awq": ("qweight",),
}
"""Of these parts (instead of ``weight`` or beside it) a quantised matrix has at least one."""

SCALE: dict[QuantMethod, str] = {
    "fp8": "weight_scale_inv",
    "compressed-tensors": "weight_scale",
    "gptq": "scales",
    "awq": "scales",
}
"""The part that holds the scales."""

FP8 = ("float8_e4m3fn",)
FP8_SCALES = (*SCALES, "float8_e8m0fnu")
"""Powers of two may be stored as their exponents."""

INT8 = ("int8",)
WORDS = ("int32",)
INDICES = ("int64", "int32")


class Headers(Protocol):
    """What is known of a checkpoint's tensors without reading them."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor called ``name``."""

    def file(self, name: str) -> Path | None:
        """Where the tensor ``name``, which is there, lies; None if that is not known."""

    def stored(self, name: str) -> str | None:
        """The dtype of ``name``; None if only its name is known. CheckpointError for one that torch has not."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that belongs to a quantised matrix, and what it has to be: of that shape, of one of these dtypes."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


Parts = dict[str, Part]
"""By the end of their names: ``weight_scale``."""


def is_quantized(headers: Headers, scheme: QuantScheme, name: str) -> bool:
    """Whether the matrix ``name`` (``X.weight``) is stored quantised: the parts that are there tell, not its name."""
    return mark_of(headers, scheme, name) is not None


def mark_of(headers: Headers, scheme: QuantScheme, name: str) -> str | None:
    """Full name of the part that tells that the matrix ``name`` (``X.weight``) is stored quantised; None: it is not."""
    base = name.removesuffix(".weight")
    return next(filter(headers.has, (f"{base}.{mark}" for mark in MARKS[scheme.method])), None)


def quantized_parts(headers: Headers, scheme: QuantScheme, name: str, shape: tuple[int, int]) -> Parts | None:
    """What the matrix ``name`` (``X.weight``, [N, K] = ``shape``) consists of; None if it is stored plain.

    Parts that may be absent are among them only if they are there. Raises CheckpointError for fp8 and int8 numbers
    without a scale, for a shape that the format cannot hold, and for a matrix with a setting of its own.
    """
    base = name.removesuffix(".weight")
    if (mark := mark_of(headers, scheme, name)) is None:
        _refuse_bare_numbers(headers, scheme, name)
        return None
    if (rule := scheme.own_setting(base)) is not None:
        raise CheckpointError(
            f"{_place(headers, mark)}matrix {base!r} has a setting of its own by the rule {rule!r} of "
            "quantization_config.dynamic, expected one for all matrices"
        )
    if scheme.bits == 4 and shape[1] % 2:
        raise CheckpointError(
            f"{_place(headers, mark)}matrix {base!r} is to have {shape[1]} columns, expected an even number "
            "(4 bits each)"
        )
    if scheme.method == "compressed-tensors":
        packed = headers.has(f"{base}.weight_packed")
        return (_pack_quantized if packed else _naive_quantized)(headers, scheme, base, shape)
    return _LAYOUTS[scheme.method](headers, scheme, base, shape)


def groups_of(scheme: QuantScheme, width: int) -> tuple[int, int]:
    """(columns in a group, groups) of a row of ``width`` columns."""
    group = scheme.group_size or width
    return group, -(-width // group)


def kept_bytes(scheme: QuantScheme, shape: tuple[int, int], scale_bytes: int | None = None) -> int:
    """Bytes of a matrix [N, K] in memory, as the readers make it. ``scale_bytes``: of a scale; None: as usual for the
    method (fp8: 4, else 2). Taken to be there: zero points unless symmetric, an order of columns if it must be."""
    rows, width = shape
    if scheme.method == "fp8":
        groups = -(-width // scheme.block[1])
    else:
        groups = groups_of(scheme, width)[1]
    per_group = (scale_bytes or (4 if scheme.method == "fp8" else 2)) + (0 if scheme.symmetric else 1)
    order = ITEM_BYTES["int64"] * width if scheme.ordered and groups > 1 else 0
    return rows * width * scheme.bits // 8 + rows * groups * per_group + order


def scale_bytes(headers: Headers, scheme: QuantScheme, name: str) -> int | None:
    """Bytes of a scale of the matrix ``name`` (``X.weight``) in memory; None if that is not known."""
    scales = f"{name.removesuffix('.weight')}.{SCALE[scheme.method]}"
    dtype = headers.stored(scales) if headers.has(scales) else None
    if dtype is None:
        return None
    return ITEM_BYTES[dtype if dtype in SCALES else "float32"]


def _place(headers: Headers, name: str) -> str:
    """How an error about ``name`` begins."""
    file = headers.file(name)
    return "" if file is None else f"{file}: "


def _refuse_bare_numbers(headers: Headers, scheme: QuantScheme, name: str) -> None:
    dtype = headers.stored(name) if headers.has(name) else None
    if dtype is not None and ITEM_BYTES[dtype] == 1:
        base = name.removesuffix(".weight")
        marks = " or ".join(f"{base}.{mark}" for mark in MARKS[scheme.method])
        raise CheckpointError(
            f"{_place(headers, name)}tensor {name!r} is {shown((dtype,))}, but there is no {marks} for it: "
            f"expected that, or weights in one of {shown(SCALES)}"
        )


def _fp8_blocks(headers: Headers, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> Parts:
    """DeepSeek-V3: ``weight`` [N, K]; ``weight_scale_inv``, one for every block, cut off at the edges."""
    high, wide = scheme.block
    blocks = (-(-shape[0] // high), -(-shape[1] // wide))
    return _parts(base, weight=(shape, FP8), weight_scale_inv=(blocks, FP8_SCALES))


def _naive_quantized(headers: Headers, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> Parts:
    """compressed-tensors' int-quantized and float-quantized: ``weight`` [N, K]; ``weight_scale`` [N, groups], or [1]
    for the whole matrix; ``weight_zero_point`` alike, if asymmetric; ``weight_g_idx`` [K], the group of each column, or
    -1."""
    _, groups = groups_of(scheme, shape[1])
    scales = (1,) if scheme.one_scale else (shape[0], groups)
    numbers, dtypes = (FP8, FP8_SCALES) if scheme.floating else (INT8, SCALES)
    parts = _parts(base, weight=(shape, numbers), weight_scale=(scales, dtypes))
    if not scheme.symmetric:
        parts |= _parts(base, weight_zero_point=(scales, INT8))
    return parts | _order(headers, scheme, f"{base}.weight_g_idx", shape[1])


def _pack_quantized(headers: Headers, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> Parts:
    """compressed-tensors' pack-quantized: ``weight_packed`` [N, K * bits / 32], along K; ``weight_scale`` [N, groups];
    ``weight_shape`` [2]; ``weight_zero_point``, if asymmetric, packed along N, or by older versions int8 [N, groups];
    ``weight_g_idx`` [K]."""
    rows, width = shape
    _, groups = groups_of(scheme, width)
    parts = _parts(
        base,
        weight_shape=((2,), INDICES),
        weight_packed=((rows, _words(width, scheme.bits)), WORDS),
        weight_scale=((rows, groups), SCALES),
    )
    if not scheme.symmetric:
        name = f"{base}.weight_zero_point"
        plain = headers.has(name) and headers.stored(name) == "int8"
        packed = ((_words(rows, scheme.bits), groups), WORDS)
        parts |= _parts(base, weight_zero_point=((rows, groups), INT8) if plain else packed)
    return parts | _order(headers, scheme, f"{base}.weight_g_idx", width)


def _gptq(headers: Headers, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> Parts:
    """``qweight`` [K * bits / 32, N], along K; ``qzeros`` [groups, N * bits / 32]; ``scales`` [groups, N]; ``g_idx``
    [K], the group of each column."""
    rows, width = shape
    _, groups = groups_of(scheme, width)
    return _parts(
        base,
        qweight=((_words(width, scheme.bits), rows), WORDS),
        qzeros=((groups, _words(rows, scheme.bits)), WORDS),
        scales=((groups, rows), SCALES),
    ) | _order(headers, scheme, f"{base}.g_idx", width)


def _awq(headers: Headers, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> Parts:
    """``qweight`` [K, N / 8], along N in AWQ's order; ``qzeros`` [groups, N / 8] alike; ``scales`` [groups, N]."""
    rows, width = shape
    if rows % 8:
        name = f"{base}.qweight"
        raise CheckpointError(
            f"{_place(headers, name)}tensor {name!r} is to have {rows} rows, expected a multiple of 8 (AWQ packs 8)"
        )
    _, groups = groups_of(scheme, width)
    return _parts(
        base,
        qweight=((width, rows // 8), WORDS),
        qzeros=((groups, rows // 8), WORDS),
        scales=((groups, rows), SCALES),
    )


def _order(headers: Headers, scheme: QuantScheme, name: str, width: int) -> Parts:
    """The tensor that tells columns' groups, if it is there or has to be."""
    if not (scheme.ordered or headers.has(name)):
        return {}
    return {name.rpartition(".")[2]: Part(name, (width,), INDICES)}


def _parts(base: str, **parts: tuple[tuple[int, ...], tuple[str, ...]]) -> Parts:
    return {end: Part(f"{base}.{end}", shape, dtypes) for end, (shape, dtypes) in parts.items()}


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


_LAYOUTS: dict[QuantMethod, Callable[[Headers, QuantScheme, str, tuple[int, int]], Parts]] = {
    "fp8": _fp8_blocks,
    "gptq": _gptq,
    "awq": _awq,
}
