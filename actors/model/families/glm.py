"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's gate, grouped-query attention, a part of every head rotated."""

from __future__ import annotations

from actors.model.config_fields import Fields
from actors.model.spec import MoEDecoderSpec

from .common import Family, decoder, dense_first, experts
from .deepseek import corrected_gate, shared_width
from .gqa import gqa


def _glm4_moe(f: Fields) -> MoEDecoderSpec:
    attn, rope = gqa(
        f,
        partial_rope=True,
        qk_norm="head" if f.flag("use_qk_norm", default=False) else "none",
        qkv_bias=f.flag("attention_bias", default=False),
    )
    moe = experts(f, corrected_gate(f), "moe_intermediate_size", shared_inter=shared_width(f))
    return decoder(f, attn, rope, moe, dense_first(f))


GLM4_MOE = Family(
    _glm4_moe,
    {
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
    },
)
