"""What the families' strategies are made of: the decoder around them, layer patterns, experts, groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.model.config_fields import Fields
from actors.model.dtypes import COMPUTED
from actors.model.names import NameMap
from actors.model.quant.parse import parse_scheme
from actors.model.spec import AttnSpec, GateSpec, LayerKind, MoEDecoderSpec, MoESpec, RopeSpec

from .rope import context_length

NEUTRAL: Mapping[str, Any] = {
    "attention_bias": False,
    "clip_qkv": None,
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 0,
    "index_topk": None,
    "mlp_only_layers": [],
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_shared_experts": 0,
    "qkv_bias": False,
    "rope_interleave": False,
    "routed_scaling_factor": 1.0,
    "shared_expert_intermediate_size": 0,
    "sliding_window": None,
    "topk_group": 1,
    "use_qk_norm": False,
    "use_sliding_window": False,
}
"""Keys that change the computation of some family, with the value at which they do nothing."""


@dataclass(frozen=True, slots=True)
class Family:
    """How one ``model_type`` is read. ``defaults``: transformers' values of keys that its configuration may lack.

    Sizes, counts and the context's length have no defaults here: those of transformers are one particular model's.
    """

    build: Callable[[Fields], MoEDecoderSpec]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def decoder(
    f: Fields,
    attn: AttnSpec,
    rope: RopeSpec,
    moe: MoESpec,
    kinds: tuple[LayerKind, ...],
    names: NameMap | None = None,
) -> MoEDecoderSpec:
    """The whole model: ``f`` has the sizes that every family states, the rest comes from its strategy."""
    f.one_of("hidden_act", ("silu",), default="silu")
    f.require(not f.flag("mlp_bias", default=False), "mlp_bias", "false")
    f.require("moe" in kinds, "num_hidden_layers", "a pattern of layers with a MoE layer in it")
    _check_layer_types(f, attn, len(kinds))
    return MoEDecoderSpec(
        model_type=f.get("model_type"),
        vocab_size=f.integer("vocab_size"),
        d_model=f.integer("hidden_size"),
        n_layers=len(kinds),
        rms_eps=f.number("rms_norm_eps"),
        tie_embeddings=f.flag("tie_word_embeddings", default=False),
        max_positions=context_length(f, rope),
        attn=attn,
        rope=rope,
        moe=moe,
        layer_kinds=kinds,
        dense_inter=f.integer("intermediate_size"),
        dtype_name=_dtype_name(f),
        eos_token_ids=f.token_ids("eos_token_id"),
        bos_token_id=f.optional_integer("bos_token_id"),
        names=names or NameMap(),
        quantization=parse_scheme(f),
        n_mtp=f.integer(f.synonym("num_nextn_predict_layers", "num_mtp_layers"), default=0, minimum=0),
    )


def all_moe(f: Fields) -> tuple[LayerKind, ...]:
    """Every layer has experts."""
    return _agreed(f, [True] * f.integer("num_hidden_layers"))


def dense_first(f: Fields, every: int = 1) -> tuple[LayerKind, ...]:
    """Dense up to ``first_k_dense_replace``; from there on the multiples of ``every`` have experts."""
    first = f.integer("first_k_dense_replace", default=0, minimum=0)
    return _agreed(f, [layer >= first and layer % every == 0 for layer in range(f.integer("num_hidden_layers"))])


def sparse_step(f: Fields) -> tuple[LayerKind, ...]:
    """Every ``decoder_sparse_step``-th layer has experts, but for ``mlp_only_layers``."""
    step, dense = f.integer("decoder_sparse_step", default=1), f.indices("mlp_only_layers")
    layers = range(f.integer("num_hidden_layers"))
    return _agreed(f, [layer not in dense and (layer + 1) % step == 0 for layer in layers])


def stated_kinds(f: Fields) -> tuple[LayerKind, ...] | None:
    """``mlp_layer_types``, or None."""
    stated = f.list_of("mlp_layer_types", ("dense", "sparse"), f.integer("num_hidden_layers"))
    return None if stated is None else _kinds([entry == "sparse" for entry in stated])


def experts(f: Fields, gate: GateSpec, width_key: str, shared_inter: int = 0, shared_gated: bool = False) -> MoESpec:
    """The routed experts, ``f[width_key]`` wide."""
    n_experts, top_k = expert_count(f), f.integer("num_experts_per_tok")
    reachable = gate.topk_group * (n_experts // gate.n_group)
    of = "chosen groups" if gate.n_group > 1 else "model"
    f.require(top_k <= reachable, "num_experts_per_tok", f"at most the {reachable} experts of the {of}")
    return MoESpec(
        n_experts=n_experts,
        top_k=top_k,
        inter=f.integer(width_key),
        gate=gate,
        shared_inter=shared_inter,
        shared_gated=shared_gated,
    )


def expert_count(f: Fields) -> int:
    """The number of routed experts, which has three names."""
    return f.integer(f.synonym("n_routed_experts", "num_experts", "num_local_experts"))


def groups(f: Fields, least: int) -> tuple[int, int]:
    """(n_group, topk_group), such that a group has ``least`` experts or more."""
    n_experts = expert_count(f)
    n_group, topk_group = f.integer("n_group", default=1), f.integer("topk_group", default=1)
    f.require(
        n_experts % n_group == 0 and n_experts // n_group >= least,
        "n_group",
        f"a divisor of the {n_experts} experts that leaves {least} or more in a group",
    )
    f.require(topk_group <= n_group, "topk_group", f"at most n_group = {n_group}")
    return n_group, topk_group


def _agreed(f: Fields, sparse: list[bool]) -> tuple[LayerKind, ...]:
    """The kinds by a family's rule; a list that says otherwise is refused."""
    kinds = _kinds(sparse)
    expected = ["sparse" if entry else "dense" for entry in sparse]
    f.require(stated_kinds(f) in (None, kinds), "mlp_layer_types", f"what the other keys say: {expected}")
    return kinds


def _kinds(sparse: list[bool]) -> tuple[LayerKind, ...]:
    return tuple("moe" if entry else "dense" for entry in sparse)


def _check_layer_types(f: Fields, attn: AttnSpec, n_layers: int) -> None:
    """``layer_types`` may repeat what attention does in each layer, and no more."""
    other = "indexed_attention" if attn.indexer else "full_attention"
    windows = attn.windows or (None,) * n_layers
    expected = ["sliding_attention" if window else other for window in windows]
    f.require(f.get("layer_types") in (None, expected), "layer_types", f"what the other keys say: {expected}")


def _dtype_name(f: Fields) -> str:
    """What the model computes in, which a dtype of stored weights alone ("float8_e4m3fn") or "auto" does not tell."""
    key = "dtype" if f.get("dtype") is not None else "torch_dtype"
    name = str(f.get(key) or "float32").removeprefix("torch.")
    known = ", ".join(map(repr, COMPUTED))
    f.require(name in COMPUTED, key, f"one of {known}; a `dtype` beside torch_dtype wins over it")
    return name
