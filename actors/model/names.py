"""How tensors are called in a checkpoint. A family with other names is another :class:`NameMap`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NameMap:
    """Names on disk. The defaults are those of DeepSeek-V3 and GLM-4-MoE.

    ``expert_parts`` are the suffixes of an expert's (gate, up, down) matrices.
    """

    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer_prefix: str = "model.layers"
    moe_block: str = "mlp"
    shared_block: str = "mlp.shared_experts"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def layer(self, layer: int, name: str) -> str:
        """Full name of ``name`` in layer ``layer``."""
        return f"{self.layer_prefix}.{layer}.{name}"

    def attention(self, layer: int, name: str) -> str:
        """Full name of an attention tensor, such as ``q_proj.weight``."""
        return self.layer(layer, f"self_attn.{name}")

    def gate(self, layer: int, name: str = "weight") -> str:
        """Full name of the gate's ``weight`` or ``e_score_correction_bias``."""
        return self.layer(layer, f"{self.moe_block}.gate.{name}")

    def mlp(self, layer: int) -> tuple[str, str, str]:
        """(gate, up, down) of a dense layer's MLP."""
        return self._swiglu(layer, "mlp", ("gate_proj", "up_proj", "down_proj"))

    def shared(self, layer: int) -> tuple[str, str, str]:
        """(gate, up, down) of a layer's shared expert."""
        return self._swiglu(layer, self.shared_block, ("gate_proj", "up_proj", "down_proj"))

    def expert(self, layer: int, expert: int) -> tuple[str, str, str]:
        """(gate, up, down) of one routed expert."""
        return self._swiglu(layer, f"{self.moe_block}.experts.{expert}", self.expert_parts)

    def _swiglu(self, layer: int, block: str, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        gate, up, down = (self.layer(layer, f"{block}.{part}.weight") for part in parts)
        return gate, up, down
