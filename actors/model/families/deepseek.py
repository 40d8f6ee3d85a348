"""DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2 (2405.04434), V3 (2412.19437) and V3.2 (2512.02556)."""

from __future__ import annotations

from dataclasses import replace

from actors.model.config_fields import Fields
from actors.model.spec import AttnSpec, GateSpec, IndexerSpec, MoEDecoderSpec, Precision, RopeSpec

from .common import Family, decoder, dense_first, experts, groups, stated_kinds
from .gqa import gqa, softmax_gate
from .rope import mla_scale, rope_spec


def _deepseek(f: Fields) -> MoEDecoderSpec:
    """As the original repository's own code computes it; transformers has no such type."""
    bias = f.flag("attention_bias", default=False)
    attn, rope = gqa(f, even_heads=True, qkv_bias=bias, o_bias=bias)
    normalise = f.flag("norm_topk_prob", default=False) and f.integer("num_experts_per_tok") > 1
    gate = softmax_gate(f, normalise, scores="model", epsilon=1e-20, weights="model")
    moe = experts(f, gate, "moe_intermediate_size", shared_inter=shared_width(f))
    return decoder(f, attn, rope, moe, dense_first(f, every=f.integer("moe_layer_freq", default=1)))


def _deepseek_v2(f: Fields) -> MoEDecoderSpec:
    f.require(f.flag("rope_interleave", default=True), "rope_interleave", "true")
    attn, rope = _mla(f, interleaved=True, precision="float32")
    moe = experts(f, _limited_gate(f), "moe_intermediate_size", shared_inter=shared_width(f))
    return decoder(f, attn, rope, moe, dense_first(f))


def _deepseek_v3(f: Fields) -> MoEDecoderSpec:
    attn, rope = _mla(f, interleaved=f.flag("rope_interleave", default=True))
    moe = experts(f, corrected_gate(f), "moe_intermediate_size", shared_inter=shared_width(f))
    return decoder(f, attn, rope, moe, dense_first(f))


def _deepseek_v32(f: Fields) -> MoEDecoderSpec:
    f.require(f.flag("rope_interleave", default=True), "rope_interleave", "true")
    f.integer("q_lora_rank")
    attn, rope = _mla(f, interleaved=True)
    head_dim = f.integer("index_head_dim")
    f.require(head_dim >= attn.qk_rope_dim, "index_head_dim", f"qk_rope_head_dim = {attn.qk_rope_dim} or more")
    indexer = IndexerSpec(heads=f.integer("index_n_heads"), head_dim=head_dim, top_k=f.integer("index_topk"))
    moe = experts(f, corrected_gate(f), "moe_intermediate_size", shared_inter=shared_width(f))
    f.ignore("first_k_dense_replace")
    return decoder(f, replace(attn, indexer=indexer), rope, moe, stated_kinds(f) or dense_first(f))


def shared_width(f: Fields) -> int:
    """Several shared experts are one MLP of their widths' sum."""
    return f.integer("n_shared_experts", default=0, minimum=0) * f.integer("moe_intermediate_size")


def corrected_gate(f: Fields) -> GateSpec:
    """V3's gate: sigmoid, and a learnt correction that chooses and does not weigh."""
    f.one_of("scoring_func", ("sigmoid",), default="sigmoid")
    f.one_of("topk_method", ("noaux_tc",), default="noaux_tc")
    n_group, topk_group = groups(f, least=2)
    return GateSpec(
        scoring="sigmoid",
        bias=True,
        n_group=n_group,
        topk_group=topk_group,
        group_rank="top2_sum",
        masked=float("-inf"),
        normalise=f.flag("norm_topk_prob", default=True),
        epsilon=1e-20,
        scale=f.number("routed_scaling_factor", default=1.0),
    )


def _limited_gate(f: Fields) -> GateSpec:
    """V2's gate: softmax over all experts; the greedy one does not look at groups."""
    f.one_of("scoring_func", ("softmax",), default="softmax")
    f.require(
        not f.flag("norm_topk_prob", default=False),
        "norm_topk_prob",
        "false (transformers ignores it, the original code does not: there is no telling what is meant)",
    )
    method = f.one_of("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
    f.ignore("n_group", "topk_group")
    n_group, topk_group = groups(f, least=1) if method == "group_limited_greedy" else (1, 1)
    scale = f.number("routed_scaling_factor", default=1.0)
    return GateSpec(scoring="softmax", n_group=n_group, topk_group=topk_group, scale=scale)


def _mla(f: Fields, interleaved: bool, precision: Precision = "model") -> tuple[AttnSpec, RopeSpec]:
    heads = f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", default=heads)
    f.require(kv_heads == heads, "num_key_value_heads", f"num_attention_heads = {heads}")
    nope, rope_dim = f.integer("qk_nope_head_dim"), f.integer("qk_rope_head_dim")
    rope = rope_spec(f, rope_dim, interleaved, precision, key="qk_rope_head_dim")
    bias = f.flag("attention_bias", default=False)
    attn = AttnSpec(
        kind="mla",
        heads=heads,
        kv_heads=heads,
        head_dim=nope + rope_dim,
        scale=mla_scale(nope + rope_dim, rope),
        qkv_bias=bias,
        o_bias=bias,
        q_lora_rank=f.optional_integer("q_lora_rank", minimum=1),
        kv_lora_rank=f.integer("kv_lora_rank"),
        qk_nope_dim=nope,
        qk_rope_dim=rope_dim,
        v_dim=f.integer("v_head_dim"),
    )
    return attn, rope


_V3_DEFAULTS = {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}
DEEPSEEK = Family(_deepseek, {"rms_norm_eps": 1e-6})
DEEPSEEK_V2 = Family(_deepseek_v2, {"n_shared_experts": 2, "q_lora_rank": 1536, "rms_norm_eps": 1e-6})
DEEPSEEK_V3 = Family(_deepseek_v3, _V3_DEFAULTS)
DEEPSEEK_V32 = Family(_deepseek_v32, {**_V3_DEFAULTS, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048})
