"""Where the experts of a layer lie in memory: what the kernels need to compute all of them in one call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from actors.native import products

from .errors import MissingExpert
from .mlp import SwiGLU


class ExpertTable:
    """The held experts of one layer, all dense and of one dtype."""

    def __init__(self, experts: Mapping[int, SwiGLU]) -> None:
        """experts: by number, not empty, each with one ``gate_up``; the table keeps them alive."""
        self._experts = dict(experts)
        self.held = len(experts)
        count = max(experts) + 1
        self._gate_up = torch.zeros(count, dtype=torch.int64)
        self._down = torch.zeros(count, dtype=torch.int64)
        for number, expert in experts.items():
            assert isinstance(expert.gate_up, Tensor)
            assert isinstance(expert.down, Tensor)
            self._gate_up[number] = expert.gate_up.data_ptr()
            self._down[number] = expert.down.data_ptr()
            self._inter = expert.down.shape[1]

    def forward(self, layer: int, rows: Tensor, pair_row: Tensor, pair_expert: Tensor) -> Tensor:
        """As :meth:`~.experts.ExpertBank.forward`."""
        out = products.experts(rows, pair_row, pair_expert, self._gate_up, self._down, self._inter)
        if isinstance(out, int):
            raise MissingExpert(layer, out)
        return out


def native_tables(held: Mapping[tuple[int, int], SwiGLU]) -> dict[int, ExpertTable]:
    """A table for each layer whose experts the kernels can take."""
    by_layer: dict[int, dict[int, SwiGLU]] = {}
    for (layer, number), expert in held.items():
        by_layer.setdefault(layer, {})[number] = expert
    return {layer: ExpertTable(experts) for layer, experts in by_layer.items() if _fit(experts)}


def _fit(experts: Mapping[int, SwiGLU]) -> bool:
    downs = [expert.down for expert in experts.values()]
    first = downs[0]
    return isinstance(first, Tensor) and all(
        products.usable(first, expert.gate_up, expert.down) for expert in experts.values()
    )
