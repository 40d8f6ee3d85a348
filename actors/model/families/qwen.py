"""Qwen1.5-MoE and Qwen2-MoE, which have a gated shared expert, and Qwen3-MoE (arXiv 2407.10671, 2505.09388)."""

from __future__ import annotations

from actors.model.config_fields import Fields
from actors.model.names import NameMap
from actors.model.spec import GateSpec, MoEDecoderSpec

from .common import Family, decoder, experts, sparse_step
from .gqa import gqa, softmax_gate

_DEFAULTS = {"rms_norm_eps": 1e-6, "sliding_window": 4096}


def _qwen2_moe(f: Fields) -> MoEDecoderSpec:
    kinds = sparse_step(f)
    attn, rope = gqa(f, windows=_mixed_windows(f, len(kinds)), qkv_bias=f.flag("qkv_bias", default=True))
    shared = f.integer("shared_expert_intermediate_size")
    moe = experts(f, _gate(f), "moe_intermediate_size", shared_inter=shared, shared_gated=True)
    return decoder(f, attn, rope, moe, kinds, NameMap(shared_block="mlp.shared_expert"))


def _qwen3_moe(f: Fields) -> MoEDecoderSpec:
    kinds = sparse_step(f)
    window = f.optional_integer("sliding_window", minimum=1) if _windowed(f) else None
    f.require(f.flag("use_qk_norm", default=True), "use_qk_norm", "true")
    bias = f.flag("attention_bias", default=False)
    windows = (window,) * len(kinds) if window else ()
    attn, rope = gqa(f, windows=windows, qk_norm="head", qkv_bias=bias, o_bias=bias)
    return decoder(f, attn, rope, experts(f, _gate(f), "moe_intermediate_size"), kinds)


def _gate(f: Fields) -> GateSpec:
    return softmax_gate(f, normalise=f.flag("norm_topk_prob", default=False), ranked=True, weights="model")


def _windowed(f: Fields) -> bool:
    """Whether ``sliding_window`` counts; released models state one and switch it off."""
    f.ignore("sliding_window")
    return f.flag("use_sliding_window", default=False)


def _mixed_windows(f: Fields, n_layers: int) -> tuple[int | None, ...]:
    """Where ``layer_types`` says so; without that, in every other one of the first ``max_window_layers``."""
    windowed = _windowed(f)
    stated = f.list_of("layer_types", ("full_attention", "sliding_attention"), n_layers)
    if not windowed:
        return ()
    window, until = f.integer("sliding_window"), f.integer("max_window_layers", default=28, minimum=0)
    if stated is None:
        return tuple(window if i % 2 == 0 and i < until else None for i in range(n_layers))
    return tuple(window if kind == "sliding_attention" else None for kind in stated)


QWEN2_MOE = Family(_qwen2_moe, _DEFAULTS)
QWEN3_MOE = Family(_qwen3_moe, _DEFAULTS)
