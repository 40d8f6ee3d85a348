"""Mixtral (arXiv 2401.04088)."""

from __future__ import annotations

from actors.model.config_fields import Fields
from actors.model.names import NameMap
from actors.model.spec import MoEDecoderSpec

from .common import Family, all_moe, decoder, experts
from .gqa import gqa, softmax_gate

_NAMES = NameMap(moe_block="block_sparse_moe", expert_parts=("w1", "w3", "w2"))


def _mixtral(f: Fields) -> MoEDecoderSpec:
    kinds = all_moe(f)
    window = f.optional_integer("sliding_window", minimum=1)
    attn, rope = gqa(f, windows=(window,) * len(kinds) if window else ())
    f.require(f.flag("norm_topk_prob", default=True), "norm_topk_prob", "true")
    gate = softmax_gate(f, normalise=True, ranked=True)
    return decoder(f, attn, rope, experts(f, gate, "intermediate_size"), kinds, _NAMES)


MIXTRAL = Family(_mixtral, {"rms_norm_eps": 1e-5, "rope_theta": 1e6})
