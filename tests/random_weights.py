"""Random weights at which every part of a tiny model matters."""

from __future__ import annotations

from typing import Any

import torch


def scatter(model: Any, seed: int) -> None:
    """Give every weight a scale at which it matters: experts differ clearly, routing is not near-tied."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                value.copy_(draw(value.shape, 0.02))
            elif name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
                value.copy_(draw(value.shape, 0.5))
            elif name.endswith(("norm.weight", "layernorm.weight")):
                value.copy_(1 + draw(value.shape, 0.1))
            elif name.endswith("bias"):
                value.copy_(draw(value.shape, 0.1))
            elif name.endswith("embed_tokens.weight"):
                value.copy_(draw(value.shape, 1.0))
            elif value.dim() >= 2:
                value.copy_(draw(value.shape, value.shape[-1] ** -0.5))
