"""The gate: which experts see a row, and with what weight."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actors.native import products
from actors.native.gate import GateFields, choose
from actors.native.library import library

from .linear import linear, most_native, native
from .parallel import load_each
from .pointwise import pointwise
from .reader import TensorReader
from .spec import GateSpec, MoEDecoderSpec, MoESpec, Precision
from .weights import Checkpoint


@dataclass(frozen=True, slots=True)
class GateWeights:
    """One layer's gate. weight: [E, D]; bias: [E], added for choosing only, or None; both in the logits' dtype."""

    weight: Tensor
    bias: Tensor | None


class GateCall(NamedTuple):
    """One layer's gate for who calls the kernels himself: the ``address`` of its fields, for ``most_rows`` at a time,
    each of which gets ``top_k`` experts with weights of dtype ``weights``."""

    address: int
    most_rows: int
    top_k: int
    weights: torch.dtype


class Gate:
    """The gates of all MoE layers. Operations, their order and dtypes are those of the family in transformers.

    The kernels do them in one call where scores are fp32: they add in an order of their own, take the first of equals,
    and always choose the best first.
    """

    def __init__(self, spec: MoESpec, layers: Mapping[int, GateWeights], row_block: int = 0) -> None:
        self._top_k = spec.top_k
        self._spec = spec.gate
        self._layers = layers
        self._row_block = row_block
        self._native: dict[tuple[int, torch.dtype], GateFields] = {}

    @classmethod
    def load(
        cls,
        spec: MoEDecoderSpec,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        row_block: int = 0,
        progress: Callable[[int], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> Gate:
        """Read the gates for a model that computes in ``dtype``. Raises CheckpointError, and ValueError for a wrong
        EXPERTMESH_ISA."""
        library()  # a wrong choice of the kernels is told here, not in the first step
        read = TensorReader(checkpoint, _dtype(spec.moe.gate.logits, dtype), device, progress, scheme=spec.quantization)
        experts, names = spec.moe.n_experts, spec.names

        def load(layer: int) -> GateWeights:
            named = names.gate(layer)
            weight = read(next(filter(checkpoint.has, named), named[0]), (experts, spec.d_model))
            if not spec.moe.gate.bias:
                return GateWeights(weight, None)
            return GateWeights(weight, read(names.gate_bias(layer), (experts,)))

        layers = dict(zip(spec.moe_layers, load_each(load, spec.moe_layers), strict=True))
        return cls(spec.moe, layers, row_block)

    @torch.inference_mode()
    def route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for the normed rows x [T, D] of MoE layer ``layer``, in the model's dtype.

        Returns the experts' indices int64 [T, K], different ones in each row, and their weights [T, K]: fp32, or in
        the rows' dtype if the family says so. A row with NaN in it gets K experts like any other (topk ranks NaN
        above all numbers) and NaN weights, so that its result is NaN and no other row's is.
        """
        spec, gate = self._spec, self._layers[layer]
        if self._kernels_take(gate, x):
            weights_dtype = _dtype(spec.weights, x.dtype)
            return choose(self._fields(layer, weights_dtype), x, weights_dtype)
        scores = self._scores(gate, x)
        choice = mask_groups(scores if gate.bias is None else scores + gate.bias, spec)
        weights, experts = torch.topk(choice, self._top_k, dim=-1, sorted=spec.ranked)
        if gate.bias is not None:
            weights = scores.gather(1, experts)
        if spec.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.epsilon)
        return experts, (weights * spec.scale).to(_dtype(spec.weights, x.dtype))

    def call(self, layer: int, dtype: torch.dtype) -> GateCall | None:
        """How the kernels choose for rows of ``dtype`` as :meth:`route` does; None where it would not let them. Valid
        as long as this gate."""
        gate = self._layers[layer]
        if not self._kernels_take(gate, torch.empty(1, gate.weight.shape[1], dtype=dtype)):
            return None
        weights = _dtype(self._spec.weights, dtype)
        most = most_native(self._row_block, gate.weight, gate.weight)
        return GateCall(ctypes.addressof(self._fields(layer, weights)), int(min(most, 1 << 20)), self._top_k, weights)

    def _kernels_take(self, gate: GateWeights, x: Tensor) -> bool:
        if _dtype(self._spec.scores, x.dtype) != torch.float32 or not products.usable(x):
            return False
        logits = gate.weight.dtype
        if logits not in (torch.float32, x.dtype) or (gate.bias is not None and gate.bias.dtype != logits):
            return False
        return native(x.shape[0], self._row_block, gate.weight, gate.weight)

    def _fields(self, layer: int, weights: torch.dtype) -> GateFields:
        if (layer, weights) not in self._native:
            spec, gate = self._spec, self._layers[layer]
            rule = self._top_k, spec.n_group, spec.topk_group, spec.scoring == "softmax", spec.group_rank == "top2_sum"
            numbers = spec.normalise, spec.masked, spec.epsilon, spec.scale
            self._native[layer, weights] = GateFields.of(gate.weight, gate.bias, weights, *rule, *numbers)
        return self._native[layer, weights]

    def _scores(self, gate: GateWeights, x: Tensor) -> Tensor:
        """[T, E], between 0 and 1."""
        logits = linear(x.to(_dtype(self._spec.logits, x.dtype)), gate.weight, row_block=self._row_block)
        logits = logits.to(_dtype(self._spec.scores, x.dtype))
        if self._spec.scoring == "softmax":
            return logits.softmax(dim=-1)
        return pointwise(torch.sigmoid, logits, self._row_block)


def mask_groups(choice: Tensor, spec: GateSpec) -> Tensor:
    """[T, E] with ``spec.masked`` outside the ``topk_group`` best groups of neighbouring experts."""
    if spec.topk_group == spec.n_group:
        return choice
    grouped = choice.unflatten(1, (spec.n_group, -1))
    best_two = spec.group_rank == "top2_sum"
    ranks = grouped.topk(2, dim=-1).values.sum(dim=-1) if best_two else grouped.max(dim=-1).values
    kept = torch.topk(ranks, spec.topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(ranks, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), spec.masked).flatten(1)


def _dtype(precision: Precision, model: torch.dtype) -> torch.dtype:
    return torch.float32 if precision == "float32" else model
