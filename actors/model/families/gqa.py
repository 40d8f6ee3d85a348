"""Attention with keys and values for every group of query heads, and the gates that come with it."""

from __future__ import annotations

from typing import Any

from actors.model.config_fields import Fields
from actors.model.spec import AttnSpec, GateSpec, RopeSpec

from .rope import rope_spec


def gqa(f: Fields, partial_rope: bool = False, even_heads: bool = False, **more: Any) -> tuple[AttnSpec, RopeSpec]:
    """Grouped-query attention, ``more`` being further fields of it. ``even_heads``: the heads share hidden_size out."""
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", default=heads)
    f.require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    head_dim = f.integer("head_dim", default=hidden // heads)
    if even_heads:
        f.require(head_dim * heads == hidden, "num_attention_heads", f"heads that share hidden_size = {hidden} out")
    rope = rope_spec(f, head_dim, partial=partial_rope)
    attn = AttnSpec(
        kind="gqa",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        **more,
    )
    return attn, rope


def softmax_gate(f: Fields, normalise: bool, **more: Any) -> GateSpec:
    """Logits in the model's dtype, softmax, the best ones; ``more`` are further fields of it."""
    f.one_of("scoring_func", ("softmax",), default="softmax")
    f.one_of("topk_method", ("greedy",), default="greedy")
    return GateSpec(scoring="softmax", logits="model", normalise=normalise, **more)
