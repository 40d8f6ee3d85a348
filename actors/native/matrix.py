"""How the kernels are told of a weight: where it lies and how it is quantised, in numbers alone."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

BLOCK = 32
"""Columns of a quantised weight that the kernels take at a time."""

DENSE, INT8, INT4, W8A8, W4A8 = range(5)

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""By which numbers the kernels know the dtypes of rows that they take."""

_QUANTISED = {"int8": INT8, "int4": INT4}
_INT8_ROWS = {"int8": W8A8, "int4": W4A8}
_SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Quantised(Protocol):
    """What the kernels must know of a quantised weight; see :class:`actors.model.quant.qtensor.QTensor`."""

    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def data(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def zero(self) -> Tensor | None: ...
    @property
    def group(self) -> int: ...
    @property
    def columns(self) -> Tensor | None: ...
    @property
    def row_group(self) -> int: ...
    @property
    def lanes(self) -> bool: ...


class Place(NamedTuple):
    """The C struct ``Matrix``: addresses, 0 for what there is not, how scales are kept, and how rows are quantised."""

    data: int
    scale: int = 0
    zero: int = 0
    group: int = 0
    scale_kind: int = 0
    row_group: int = 0
    in_lanes: int = 0


Weight = Tensor | Quantised

Numbers = ctypes.c_int64 * len(Place._fields)
"""A :class:`Place` in memory."""


class Product(ctypes.Structure):
    """The C struct ``Product``: a weight [n, k] and its bias."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("w", Numbers),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, weight: Weight, bias: Tensor | None) -> Product:
        """Of a weight that has a :func:`weight_kind`; valid as long as both."""
        kind = weight_kind(weight)
        assert kind is not None
        return cls(kind, Numbers(*place(weight)), address(bias), *weight.shape)


def address(tensor: Tensor | None) -> Any:
    """Where a contiguous tensor lies; None without one."""
    return None if tensor is None else tensor.data_ptr()


def weight_kind(weight: Weight) -> int | None:
    """The number of a weight's kind, from DENSE to W4A8; None if the kernels do not take it.

    They take contiguous weights on the CPU: dense ones [N, K] in fp32 and bf16, for rows of that dtype; and int8 and
    int4 in their columns' order with K a multiple of BLOCK, not 0, and the group as well unless it is all of K.
    """
    if isinstance(weight, Tensor):
        return DENSE if weight.dtype in KINDS and _here(weight) else None
    width = weight.shape[1]
    whole_blocks = width and width % BLOCK == 0 and (weight.group % BLOCK == 0 or weight.group >= width)
    if not whole_blocks or weight.columns is not None:
        return None
    here = _here(weight.data) and _here(weight.scale) and (weight.zero is None or _here(weight.zero))
    kinds = _INT8_ROWS if weight.row_group else _QUANTISED
    return kinds.get(weight.kind) if here else None


def takes(weight: Weight, rows: torch.dtype) -> bool:
    """Whether the kernels multiply rows of this dtype with ``weight``."""
    fits = rows in KINDS and (not isinstance(weight, Tensor) or weight.dtype == rows)
    return fits and weight_kind(weight) is not None


def place(weight: Tensor | Quantised, row: int = 0) -> Place:
    """Where the rows from ``row`` on of a weight lie that has a :func:`weight_kind`; valid as long as the weight."""
    if isinstance(weight, Tensor):
        return Place(_address(weight, row))
    group = min(weight.group, weight.shape[1])
    return Place(
        _address(weight.data, row),
        _address(weight.scale, row),
        0 if weight.zero is None else _address(weight.zero, row),
        group,
        _SCALES[weight.scale.dtype],
        min(weight.row_group, weight.shape[1]),
        weight.lanes,
    )


def _here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _address(tensor: Tensor, row: int) -> int:
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize
