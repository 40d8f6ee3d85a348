"""The gate: which experts see a row, and with what weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import linear
from .pointwise import pointwise
from .spec import GateKind, MoEDecoderSpec, MoESpec
from .weights import Checkpoint, TensorReader


@dataclass(frozen=True, slots=True)
class GateWeights:
    """One layer's gate. weight: fp32 [E, D]; bias: fp32 [E], added for choosing only."""

    weight: Tensor
    bias: Tensor


Rule = Callable[[Tensor, GateWeights, MoESpec, int], tuple[Tensor, Tensor]]


class Gate:
    """The gates of all MoE layers."""

    def __init__(self, spec: MoESpec, layers: Mapping[int, GateWeights], row_block: int = 0) -> None:
        self._spec = spec
        self._layers = layers
        self._row_block = row_block
        self._rule = RULES[spec.gate]

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
        return self._rule(x, self._layers[layer], self._spec, self._row_block)


def sigmoid_noaux_tc(x: Tensor, gate: GateWeights, spec: MoESpec, row_block: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's rule (arXiv 2412.19437, section 2.1.2), as in transformers: see :meth:`Gate.route`."""
    scores = pointwise(torch.sigmoid, linear(x.to(torch.float32), gate.weight, row_block=row_block), row_block)
    choice = _mask_groups(scores + gate.bias, spec)
    experts = torch.topk(choice, spec.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if spec.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * spec.routed_scaling_factor


def _mask_groups(choice: Tensor, spec: MoESpec) -> Tensor:
    """[T, E] with -inf outside the topk_group groups whose best two scores have the highest sums."""
    if spec.topk_group == spec.n_group:
        return choice
    grouped = choice.view(choice.shape[0], spec.n_group, -1)
    group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.topk(group_scores, spec.topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).view_as(choice)


RULES: Mapping[GateKind, Rule] = {"sigmoid_noaux_tc": sigmoid_noaux_tc}
