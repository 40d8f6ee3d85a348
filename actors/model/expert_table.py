"""Where the experts of a layer lie in memory: what the kernels need to compute all of them in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from actors.native import products
from actors.native.expert_places import ExpertPlaces

from .errors import MissingExpert
from .linear import MANY_OF_EXPERTS, most_native
from .mlp import SwiGLU


class ExpertTable:
    """The held experts of one layer, all of one form."""

    def __init__(self, experts: Mapping[int, SwiGLU], places: ExpertPlaces) -> None:
        """experts: by number, not empty; the table keeps them alive. places: theirs together."""
        self._experts = dict(experts)
        self._places = places
        self.held = len(experts)
        self.down = next(iter(experts.values())).down
        """Of one of them: the others are kept like it."""

    def call(self, row_block: int, dtype: torch.dtype) -> tuple[int, int, int, int, int, float] | None:
        """How the kernels compute rows of ``dtype`` as :meth:`forward` does: the kinds of gate and up and of down, the
        address of the matrices, the hidden width, the number of experts, and for how many pairs at a time the bank asks
        this table. None where it never does."""
        places = self._places
        rows = torch.empty(1, places.d_model, dtype=dtype)
        most = most_native(row_block, rows, self.down, many=MANY_OF_EXPERTS) if places.take(dtype) else 0.0
        if not most:
            return None
        numbers = ctypes.addressof(places.numbers)
        return *places.kinds, numbers, places.inter, len(places), most * self.held

    def forward(self, layer: int, rows: Tensor, pair_row: Tensor, pair_expert: Tensor) -> Tensor:
        """As :meth:`~.experts.ExpertBank.forward`."""
        out = products.experts(rows, pair_row, pair_expert, self._places)
        if isinstance(out, int):
            raise MissingExpert(layer, out)
        return out


def native_tables(held: Mapping[tuple[int, int], SwiGLU]) -> dict[int, ExpertTable]:
    """A table for each layer whose experts the kernels can take."""
    by_layer: dict[int, dict[int, SwiGLU]] = {}
    for (layer, number), expert in held.items():
        by_layer.setdefault(layer, {})[number] = expert
    tables = {layer: _table(experts) for layer, experts in by_layer.items()}
    return {layer: table for layer, table in tables.items() if table is not None}


def _table(experts: Mapping[int, SwiGLU]) -> ExpertTable | None:
    single = {number: expert.places for number, expert in experts.items() if expert.places is not None}
    together = ExpertPlaces.together(single) if len(single) == len(experts) else None
    return None if together is None else ExpertTable(experts, together)
