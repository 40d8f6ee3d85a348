"""Where the matrices of SwiGLU experts lie, for kernels that compute many of them in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .matrix import DENSE, Place, Weight, place, weight_kind

_NUMBERS = 3 * len(Place._fields)
"""Of one expert: gate, up and down."""

Rounding = tuple[int, int] | None
"""Columns in a group of the weight and of the rows; None for rows that stay as they are. Rows that several matrices of
one call are multiplied with become int8 but once."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlaces:
    """Experts by number, all alike; an expert that is not held has addresses of 0. Valid as long as the weights.

    ``kinds``: of gate and up, and of down. ``dtype``: of the rows that they take, None: any that the kernels know.
    ``rounding``: how rows become int8 for gate and up, and for down.
    """

    numbers: ctypes.Array[ctypes.c_int64]
    kinds: tuple[int, int]
    inter: int
    d_model: int
    dtype: torch.dtype | None
    rounding: tuple[Rounding, Rounding]

    def __len__(self) -> int:
        return len(self.numbers) // _NUMBERS

    def take(self, rows: torch.dtype) -> bool:
        """Whether rows of this dtype can be sent to these experts."""
        return self.dtype is None or rows == self.dtype

    @classmethod
    def of(cls, gate_up: Weight | tuple[Weight, ...], down: Weight) -> ExpertPlaces | None:
        """One expert, number 0. gate_up: [2I, D], the gate's rows first, or both [I, D]; down: [D, I].

        None if the kernels cannot take them, if gate and up are of two kinds or want rows of two kinds, or if the
        shapes do not fit or are empty: an address of 0 is for an expert that is not held.
        """
        d_model, inter = down.shape
        gate, up = gate_up if isinstance(gate_up, tuple) else (gate_up, gate_up)
        dense = {weight.dtype for weight in (gate, up, down) if isinstance(weight, Tensor)}
        kinds = [weight_kind(weight) for weight in (gate, up, down)]
        if len(dense) > 1 or None in kinds or kinds[0] != kinds[1]:
            return None
        height = inter if isinstance(gate_up, tuple) else 2 * inter
        if not inter * d_model or any(tuple(weight.shape) != (height, d_model) for weight in (gate, up)):
            return None
        places = place(gate), place(up, 0 if isinstance(gate_up, tuple) else inter), place(down)
        numbers = (ctypes.c_int64 * _NUMBERS)(*(number for one in places for number in one))
        of_gate, of_up, of_down = map(_rounding, places)
        if of_gate != of_up:
            return None
        rounding = of_gate, of_down
        return cls(numbers, (kinds[0] or DENSE, kinds[2] or DENSE), inter, d_model, next(iter(dense), None), rounding)

    @classmethod
    def together(cls, experts: Mapping[int, ExpertPlaces]) -> ExpertPlaces | None:
        """Single experts under their numbers; None if they are not alike."""
        first = next(iter(experts.values()))
        if any(one._form() != first._form() for one in experts.values()):
            return None
        numbers = [0] * (_NUMBERS * (max(experts) + 1))
        for index, one in experts.items():
            numbers[index * _NUMBERS : (index + 1) * _NUMBERS] = one.numbers
        return cls((ctypes.c_int64 * len(numbers))(*numbers), *first._form())

    def _form(self) -> tuple[tuple[int, int], int, int, torch.dtype | None, tuple[Rounding, Rounding]]:
        return self.kinds, self.inter, self.d_model, self.dtype, self.rounding


def _rounding(one: Place) -> Rounding:
    return (one.group, one.row_group) if one.row_group else None
