"""A quantised matrix as it lies in memory, whatever wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actors.model.finite import all_finite
from actors.model.heap import lasting
from actors.quant_kind import NumberKind

from .lanes import ELEMENT, HEIGHT, WIDTH, from_lanes, to_lanes
from .packing import unpack_nibbles

DATA = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
SCALES = (torch.float32, torch.bfloat16, torch.float16)
MIDDLE = {"int8": 0, "int4": 8}
"""The zero point where none is kept."""
ZERO_PARTS = {"int8": 1, "int4": 8}
"""Zero points are kept in these parts of a step."""
LARGEST = {"int8": 255, "int4": 15, "fp8": 448}
"""No number is further from its zero point."""

TILE_BYTES = 4 * 1024 * 1024
"""Of fp32 numbers that are dequantised at a time."""

MAX_INT8_COLUMNS = 2**16
"""Up to here sums of 255 * 128 per column stay within int32."""


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """``W[n, k] = (data[n, k] - zero[n, k // group] / parts) * scale[n, k // group]``, N rows of K columns.

    data: int8 or float8_e4m3fn [N, K]; for ``int4`` uint8 [N, K / 2], column 2j in the low nibble of byte j, unsigned.
    scale: fp32, bf16 or fp16 [N, ceil(K / group)]: the last group may be shorter. zero: as scale, int8 (``int8``,
    parts is 1) or uint8 in eighths of a step (``int4``, parts is 8), no more than 15 steps, or None: 0 (for int4: 8
    steps); fp8 has none. columns: int64 [K] or None; stored column j is the
    matrix's column ``columns[j]`` (GPTQ's act order). row_group (int8 and int4): not 0 where rows that are
    multiplied are quantised to int8 as well: how many of a row's columns share a scale, a multiple of group or at least
    K. lanes: rows lie side by side, see :mod:`.lanes`. Raises ValueError for parts that do not fit.
    """

    kind: NumberKind
    data: Tensor
    scale: Tensor
    group: int
    zero: Tensor | None = None
    columns: Tensor | None = None
    row_group: int = 0
    lanes: bool = False

    def __post_init__(self) -> None:
        if self.kind not in DATA:
            raise ValueError(f"kind is {self.kind!r}: allowed is one of {', '.join(DATA)}")
        if self.group < 1:
            raise ValueError(f"group is {self.group}: allowed is an integer >= 1")
        if self.data.dtype != DATA[self.kind] or self.data.dim() != 2:
            found = f"{self.data.dtype} {list(self.data.shape)}"
            raise ValueError(f"data is {found}: allowed for {self.kind} is a matrix of {DATA[self.kind]}")
        rows, width = self.shape
        groups = (rows, -(-width // self.group))
        _expect("scale", self.scale, SCALES, groups)
        if self.zero is not None:
            _expect("zero", self.zero, (DATA[self.kind],) if self.kind in MIDDLE else (), groups)
        if self.columns is not None:
            _expect("columns", self.columns, (torch.int64,), (width,))
        if self.row_group:
            self._expect_int8_rows()

    def _expect_int8_rows(self) -> None:
        width, reordered = self.shape[1], self.columns is not None
        if self.kind == "fp8" or reordered or width > MAX_INT8_COLUMNS:
            raise ValueError(
                f"row_group is {self.row_group} with kind {self.kind}, {width} columns{', reordered' * reordered}: "
                f"allowed is int8 or int4 with at most {MAX_INT8_COLUMNS} columns in their order"
            )
        if self.row_group < 0 or (self.row_group % self.group and self.row_group < width):
            raise ValueError(
                f"row_group is {self.row_group}: allowed is a multiple of group, which is {self.group}, or at least "
                f"{width}, the columns"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, width = self.data.shape
        return rows, width * 2 if self.kind == "int4" else width

    @property
    def device(self) -> torch.device:
        """Where all parts lie."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        parts = (self.data, self.scale, self.zero, self.columns)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on ``device``; nothing is copied if it lies there."""
        return replace(
            self,
            data=self.data.to(device),
            scale=self.scale.to(device),
            zero=None if self.zero is None else self.zero.to(device),
            columns=None if self.columns is None else self.columns.to(device),
        )

    @property
    def fits_lanes(self) -> bool:
        """Whether :meth:`in_lanes` takes it, and it is of use: rows are int8 as well."""
        rows, width = self.shape
        return bool(self.row_group and rows) and not (self.lanes or rows % HEIGHT or width % WIDTH)

    def in_lanes(self) -> QTensor:
        """A copy in the order of :mod:`.lanes`, on the CPU."""
        return stack([self], in_lanes=True)

    def in_rows(self) -> QTensor:
        """Row by row: a copy, or ``self`` where it lies so."""
        if not self.lanes:
            return self
        return replace(
            self,
            data=from_lanes(self.data, ELEMENT),
            scale=from_lanes(self.scale, self.scale.itemsize),
            zero=None if self.zero is None else from_lanes(self.zero, 1),
            lanes=False,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K]: products in fp32, one cast to ``dtype``."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """:meth:`dequantize` into ``out`` [N, K], floating, on the same device: part of a larger one, say."""
        for start, tile in self.tiles(torch.float32):
            rows = out[start : start + tile.shape[0]]
            if self.columns is None:
                rows.copy_(tile)
            else:
                rows[:, self.columns] = tile.to(out.dtype)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether all of the matrix is finite in ``dtype``. On the CPU; the scales tell, nearly always."""
        largest = float(self.scale.abs().max()) if self.scale.numel() else 0.0
        if LARGEST[self.kind] * largest <= torch.finfo(dtype).max:
            return True
        return all(all_finite(tile.flatten()) for _, tile in self.tiles(dtype))

    def tiles(self, dtype: torch.dtype, tile_bytes: int = TILE_BYTES) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows [n, K] in ``dtype``) from the top to the bottom, columns in their *stored* order.

        Each tile is memory of its own; at most ``tile_bytes`` of fp32 (one row at least) lie about at a time, and as
        much again in ``dtype``. Where the tiles are cut depends on K alone.
        """
        height, plain = self.tile_rows(tile_bytes), self.in_rows()
        for start in range(0, self.shape[0], height):
            yield start, plain._rows(slice(start, start + height)).to(dtype)

    def tile_rows(self, tile_bytes: int) -> int:
        """Rows of a tile of at most ``tile_bytes`` of fp32: one at least, whole eights where there are more."""
        height = max(1, tile_bytes // (4 * max(1, self.shape[1])))
        return height if height <= 8 else height - height % 8

    def _rows(self, rows: slice) -> Tensor:
        """fp32 [n, K], stored order of columns."""
        data = self.data[rows]
        values = unpack_nibbles(data).float() if self.kind == "int4" else data.float()
        scale = self.scale[rows].float()
        zero = None if self.zero is None else self.zero[rows].float() / ZERO_PARTS[self.kind]
        if zero is None and MIDDLE.get(self.kind):
            values.sub_(MIDDLE[self.kind])
        whole = self.shape[1] // self.group
        cut = whole * self.group
        for part, groups in ((values[:, :cut], slice(0, whole)), (values[:, cut:], slice(whole, None))):
            if part.shape[1]:
                grouped = part.unflatten(1, (-1, min(self.group, part.shape[1])))
                if zero is not None:
                    grouped.sub_(zero[:, groups, None])
                grouped.mul_(scale[:, groups, None])
        return values


def can_stack(parts: Sequence[QTensor]) -> bool:
    """Whether :func:`stack` takes them: kind, K, group, order of columns and treatment of rows must agree."""
    first = parts[0]
    return all(_layout(part) == _layout(first) and _same_columns(part, first) for part in parts)


def stack(parts: Sequence[QTensor], in_lanes: bool = False) -> QTensor:
    """The matrices under one another; ``in_lanes``: in that order, which each must fit, and on the CPU. ValueError for
    what :func:`can_stack` refuses."""
    if not can_stack(parts):
        found = ", ".join(f"{p.kind} K={p.shape[1]} group={p.group} act order={p.columns is not None}" for p in parts)
        raise ValueError(f"matrices {found} cannot be stacked: expected one kind, K, group and order of columns")
    first = parts[0]
    scales = {part.scale.dtype for part in parts}
    scale_dtype = scales.pop() if len(scales) == 1 else torch.float32
    zero = None
    if any(part.zero is not None for part in parts):
        zero = _under_one_another([_zero(part) for part in parts], in_lanes, 1)
    scale = _under_one_another([part.scale.to(scale_dtype) for part in parts], in_lanes, scale_dtype.itemsize)
    data = _under_one_another([part.data for part in parts], in_lanes, ELEMENT)
    return replace(first, data=data, scale=scale, zero=zero, lanes=in_lanes or first.lanes)


def _under_one_another(parts: Sequence[Tensor], in_lanes: bool, element: int) -> Tensor:
    """``torch.cat`` of matrices [n, w], fp8 too, which stay when ``parts`` are dropped. ``element``: bytes of one."""
    first = parts[0]
    shape = (sum(len(part) for part in parts), first.shape[1])
    on_cpu = first.device.type == "cpu"
    out = lasting(shape, first.dtype) if on_cpu else torch.empty(shape, dtype=first.dtype, device=first.device)
    for given, rows in zip(parts, out.split([len(part) for part in parts]), strict=True):
        part = given.reshape(-1).view(given.shape)  # a transposed [1, n] counts as contiguous, but is no bytes' view
        if in_lanes:
            to_lanes(part, element, rows)
        else:
            rows.view(torch.uint8).copy_(part.view(torch.uint8))
    return out


def _layout(q: QTensor) -> tuple[object, ...]:
    return q.kind, q.shape[1], q.group, q.row_group, q.lanes


def _same_columns(a: QTensor, b: QTensor) -> bool:
    if a.columns is None or b.columns is None:
        return a.columns is b.columns
    return torch.equal(a.columns, b.columns)


def _zero(q: QTensor) -> Tensor:
    if q.zero is not None:
        return q.zero
    return torch.full(q.scale.shape, MIDDLE[q.kind] * ZERO_PARTS[q.kind], dtype=q.data.dtype, device=q.device)


def _expect(part: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        allowed = f"{' or '.join(map(str, dtypes))} {list(shape)}" if dtypes else "none"
        raise ValueError(f"{part} is {tensor.dtype} {list(tensor.shape)}: allowed is {allowed}")
