"""The gate: which experts see a row, and with what weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import linear
from .pointwise import pointwise
from .reader import TensorReader
from .spec import GateSpec, MoEDecoderSpec, MoESpec
from .weights import Checkpoint


@dataclass(frozen=True, slots=True)
class GateWeights:
    """One layer's gate. weight: fp32 [E, D]; bias: fp32 [E], added for choosing only."""

    weight: Tensor
    bias: Tensor


class Gate:
    """The gates of all MoE layers."""

    def __init__(self, spec: MoESpec, layers: Mapping[int, GateWeights], row_block: int = 0) -> None:
        self._spec = spec
        self._layers = layers
        self._row_block = row_block

    @classmethod
    def load(
        cls,
        spec: MoEDecoderSpec,
        checkpoint: Checkpoint,
        row_block: int = 0,
        progress: Callable[[int], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> Gate:
        """Read the gates, in fp32 whatever the model's dtype. Raises CheckpointError."""
        read = TensorReader(checkpoint, torch.float32, device, progress)
        experts, names = spec.moe.n_experts, spec.names
        layers = {
            layer: GateWeights(
                read(names.gate(layer), (experts, spec.d_model)),
                read(names.gate(layer, "e_score_correction_bias"), (experts,)),
            )
            for layer in spec.moe_layers
        }
        return cls(spec.moe, layers, row_block)

    @torch.inference_mode()
    def route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for the normed rows x [T, D] of MoE layer ``layer``.

        Returns the experts' indices int64 [T, K], in no particular order, and their weights fp32 [T, K].
        """
        return sigmoid_noaux_tc(x, self._layers[layer], self._spec, self._row_block)


def sigmoid_noaux_tc(x: Tensor, gate: GateWeights, spec: MoESpec, row_block: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's rule (arXiv 2412.19437, section 2.1.2), as in transformers: see :meth:`Gate.route`."""
    scores = pointwise(torch.sigmoid, linear(x.to(torch.float32), gate.weight, row_block=row_block), row_block)
    choice = _mask_groups(scores + gate.bias, spec.gate)
    experts = torch.topk(choice, spec.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if spec.gate.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + spec.gate.epsilon)
    return experts, weights * spec.gate.scale


def _mask_groups(choice: Tensor, spec: GateSpec) -> Tensor:
    """[T, E] with -inf outside the topk_group groups whose best two scores have the highest sums."""
    if spec.topk_group == spec.n_group:
        return choice
    grouped = choice.view(choice.shape[0], spec.n_group, -1)
    group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.topk(group_scores, spec.topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).view_as(choice)
