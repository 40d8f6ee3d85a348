"""How tensors are called in a checkpoint. A family with other names is another :class:`NameMap`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NameMap:
    """Names on disk. The defaults are those of DeepSeek, GLM-4-MoE, Qwen3-MoE and OLMoE.

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

    def gate(self, layer: int) -> tuple[str, ...]:
        """Full names that the gate's weight [E, D] may have; a checkpoint with fused experts has the last one."""
        return tuple(self.layer(layer, f"{block}.gate.weight") for block in dict.fromkeys((self.moe_block, "mlp")))

    def gate_bias(self, layer: int) -> str:
        """Full name of the gate's correction [E]."""
        return self.layer(layer, f"{self.moe_block}.gate.e_score_correction_bias")

    def mlp(self, layer: int) -> tuple[str, str, str]:
        """(gate, up, down) of a dense layer's MLP."""
        return self._swiglu(layer, "mlp", ("gate_proj", "up_proj", "down_proj"))

    def shared(self, layer: int) -> tuple[str, str, str]:
        """(gate, up, down) of a layer's shared expert."""
        return self._swiglu(layer, self.shared_block, ("gate_proj", "up_proj", "down_proj"))

    def shared_gate(self, layer: int) -> str:
        """Full name of the gate [1, D] of a layer's shared expert."""
        return self.layer(layer, f"{self.shared_block}_gate.weight")

    def expert(self, layer: int, expert: int) -> tuple[str, str, str]:
        """(gate, up, down) of one routed expert."""
        return self._swiglu(layer, f"{self.moe_block}.experts.{expert}", self.expert_parts)

    def fused_experts(self, layer: int) -> tuple[str, str]:
        """(gate_up [E, 2I, D], down [E, D, I]) of all routed experts, where a checkpoint holds them in one piece.

        Those are the names that transformers gives them in memory, whatever the family.
        """
        return self.layer(layer, "mlp.experts.gate_up_proj"), self.layer(layer, "mlp.experts.down_proj")

    def is_fused(self, layer: int, expert: int, has: Callable[[str], bool]) -> bool:
        """Whether an expert is to be sought in its layer's fused tensors, of a checkpoint that has the tensors that
        ``has`` says: where these are and no gate of its own is."""
        return has(self.fused_experts(layer)[0]) and not has(self.expert(layer, expert)[0])

    def _swiglu(self, layer: int, block: str, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        gate, up, down = (self.layer(layer, f"{block}.{part}.weight") for part in parts)
        return gate, up, down
