"""Where the experts of a layer lie in memory: what the kernels need to compute all of them in one call."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from actors.native import products
from actors.native.expert_places import ExpertPlaces

from .errors import MissingExpert
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
