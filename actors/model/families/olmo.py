"""OLMoE (arXiv 2409.02060)."""

from __future__ import annotations

from actors.model.config_fields import Fields
from actors.model.spec import MoEDecoderSpec

from .common import Family, all_moe, decoder, experts
from .gqa import gqa, softmax_gate


def _olmoe(f: Fields) -> MoEDecoderSpec:
    bias = f.flag("attention_bias", default=False)
    attn, rope = gqa(f, even_heads=True, qk_norm="full", clip=f.optional_number("clip_qkv"), qkv_bias=bias, o_bias=bias)
    gate = softmax_gate(f, normalise=f.flag("norm_topk_prob", default=False), ranked=True, weights="model")
    return decoder(f, attn, rope, experts(f, gate, "intermediate_size"), all_moe(f))


OLMOE = Family(_olmoe, {"rms_norm_eps": 1e-5})
