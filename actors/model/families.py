"""From a Hugging Face config.json to a :class:`MoEDecoderSpec`. A new family is a row in FAMILIES."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from .config_fields import Fields
from .errors import CheckpointError, UnsupportedModelError
from .rope import magnitude
from .spec import AttnSpec, GateSpec, LayerKind, MoEDecoderSpec, MoESpec, RopeSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROPE_TYPES = ("default", "yarn")


def spec_from_config(config: dict[str, Any]) -> MoEDecoderSpec:
    """The model that a parsed config.json describes.

    Takes hub style (``rope_theta`` and ``rope_scaling``) and transformers 5 style (``rope_parameters``).
    Raises UnsupportedModelError naming the key, its value, and what is allowed.
    """
    fields = Fields(config)
    family = fields.one_of("model_type", tuple(FAMILIES))
    _refuse_unsupported(fields)
    return FAMILIES[family](fields)


def load_spec(path: str | Path) -> MoEDecoderSpec:
    """The model in the checkpoint folder ``path``; its stop ids include those of generation_config.json.

    Raises CheckpointError for a folder or file that cannot be read, UnsupportedModelError for what it says.
    """
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, expected a folder with config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json")
    spec = spec_from_config(_read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return spec
    more = Fields(_read_json(generation), "generation_config.json: ").token_ids("eos_token_id")
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + more)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def _refuse_unsupported(f: Fields) -> None:
    """Keys that would change the computation of any family in a way that is not built."""
    f.require(f.get("quantization_config") is None, "quantization_config", "none (quantised weights are not read)")
    f.one_of("hidden_act", ("silu",), default="silu")
    f.one_of("scoring_func", ("sigmoid",), default="sigmoid")
    f.one_of("topk_method", ("noaux_tc",), default="noaux_tc")
    f.require(f.get("moe_layer_freq") in (None, 1), "moe_layer_freq", "1")


def _glm4_moe(f: Fields) -> MoEDecoderSpec:
    heads, kv_heads = f.integer("num_attention_heads"), f.integer("num_key_value_heads")
    f.require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    head_dim = f.integer("head_dim", default=f.integer("hidden_size") // heads)
    rope = _rope(f, head_dim, default_partial=0.5, interleaved=False)
    attn = AttnSpec(
        kind="gqa",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rope.dim,
        scale=head_dim**-0.5,
        qk_norm="head" if f.flag("use_qk_norm", default=False) else "none",
        qkv_bias=f.flag("attention_bias", default=False),
    )
    return _decoder(f, attn, rope, default_eps=1e-5)


def _deepseek_v3(f: Fields) -> MoEDecoderSpec:
    heads = f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", default=heads)
    f.require(kv_heads == heads, "num_key_value_heads", f"num_attention_heads = {heads}")
    nope, rope_dim = f.integer("qk_nope_head_dim"), f.integer("qk_rope_head_dim")
    rope = _rope(f, rope_dim, default_partial=1.0, interleaved=f.flag("rope_interleave", default=True))
    f.require(rope.dim == rope_dim, "partial_rotary_factor", "1.0")
    attn = AttnSpec(
        kind="mla",
        heads=heads,
        kv_heads=heads,
        head_dim=nope + rope_dim,
        rotary_dim=rope_dim,
        scale=_mla_scale(nope + rope_dim, rope),
        qkv_bias=f.flag("attention_bias", default=False),
        o_bias=f.flag("attention_bias", default=False),
        q_lora_rank=f.optional_integer("q_lora_rank", minimum=1),
        kv_lora_rank=f.integer("kv_lora_rank"),
        qk_nope_dim=nope,
        qk_rope_dim=rope_dim,
        v_dim=f.integer("v_head_dim"),
    )
    return _decoder(f, attn, rope, default_eps=1e-6)


FAMILIES: dict[str, Callable[[Fields], MoEDecoderSpec]] = {
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
}


def _mla_scale(qk_dim: int, rope: RopeSpec) -> float:
    """DeepSeek multiplies the softmax scale by mscale(factor, mscale_all_dim) squared when YaRN is on."""
    scale: float = qk_dim**-0.5
    if rope.type == "default" or not rope.mscale_all_dim:
        return scale
    return scale * magnitude(rope.factor, rope.mscale_all_dim) ** 2


def _decoder(f: Fields, attn: AttnSpec, rope: RopeSpec, default_eps: float) -> MoEDecoderSpec:
    """What both families share: sizes, the layer pattern, the experts."""
    n_layers = f.integer("num_hidden_layers")
    n_dense = min(f.integer("first_k_dense_replace", minimum=0), n_layers)
    kinds: list[LayerKind] = ["dense" if layer < n_dense else "moe" for layer in range(n_layers)]
    return MoEDecoderSpec(
        model_type=f.get("model_type"),
        vocab_size=f.integer("vocab_size"),
        d_model=f.integer("hidden_size"),
        n_layers=n_layers,
        rms_eps=f.number("rms_norm_eps", default=default_eps),
        tie_embeddings=f.flag("tie_word_embeddings", default=False),
        max_positions=f.integer("max_position_embeddings"),
        attn=attn,
        rope=rope,
        moe=_moe(f),
        layer_kinds=tuple(kinds),
        dense_inter=f.integer("intermediate_size"),
        dtype=_dtype(f),
        eos_token_ids=f.token_ids("eos_token_id"),
        bos_token_id=f.optional_integer("bos_token_id"),
    )


def _moe(f: Fields) -> MoESpec:
    count_key = "n_routed_experts" if f.get("n_routed_experts") is not None else "num_local_experts"
    n_experts, top_k = f.integer(count_key), f.integer("num_experts_per_tok")
    n_group, topk_group = f.integer("n_group", default=1), f.integer("topk_group", default=1)
    f.require(
        n_experts % n_group == 0 and n_experts // n_group >= 2,
        "n_group",
        f"a divisor of {count_key} = {n_experts} that leaves 2 experts or more in a group",
    )
    f.require(topk_group <= n_group, "topk_group", f"at most n_group = {n_group}")
    reachable = topk_group * (n_experts // n_group)
    f.require(top_k <= reachable, "num_experts_per_tok", f"at most the {reachable} experts of the chosen groups")
    inter = f.integer("moe_intermediate_size")
    return MoESpec(
        n_experts=n_experts,
        top_k=top_k,
        inter=inter,
        shared_inter=f.integer("n_shared_experts", default=0, minimum=0) * inter,
        gate=GateSpec(
            scoring="sigmoid",
            bias=True,
            n_group=n_group,
            topk_group=topk_group,
            group_rank="top2_sum",
            masked=float("-inf"),
            normalise=f.flag("norm_topk_prob", default=True),
            epsilon=1e-20,
            scale=f.number("routed_scaling_factor", default=1.0),
        ),
    )


def _dtype(f: Fields) -> torch.dtype:
    key = "dtype" if f.get("dtype") is not None else "torch_dtype"
    return DTYPES[f.one_of(key, tuple(DTYPES), default="float32")]


def _rope(f: Fields, head_dim: int, default_partial: float, interleaved: bool) -> RopeSpec:
    """As in transformers: rope_scaling wins over rope_parameters, a key inside over the same key beside."""
    inner = f.sub("rope_scaling" if f.get("rope_scaling") else "rope_parameters")
    theta = inner.number("rope_theta", default=f.number("rope_theta", default=1e4), above=1.0)
    beside = f.number("partial_rotary_factor", default=default_partial)
    partial = inner.number("partial_rotary_factor", default=beside)
    dim = int(head_dim * partial)
    f.require(
        partial <= 1.0 and dim >= 2 and dim % 2 == 0,
        "partial_rotary_factor",
        f"a share of the head width {head_dim} that gives an even count, got {partial} of it = {dim}",
    )
    type_key = "rope_type" if inner.get("rope_type") is not None else "type"
    kind = cast(Literal["default", "yarn"], inner.one_of(type_key, ROPE_TYPES, default="default"))
    spec = RopeSpec(type=kind, theta=theta, dim=dim, interleaved=interleaved)
    return spec if kind == "default" else _yarn(f, inner, spec)


def _yarn(f: Fields, inner: Fields, base: RopeSpec) -> RopeSpec:
    positions = f.integer("max_position_embeddings")
    original = inner.integer("original_max_position_embeddings", default=positions)
    factor = inner.number("factor", default=positions / original)
    return replace(
        base,
        factor=factor,
        original_max_positions=original,
        beta_fast=inner.number("beta_fast", default=32.0),
        beta_slow=inner.number("beta_slow", default=1.0),
        mscale=inner.optional_number("mscale"),
        mscale_all_dim=inner.optional_number("mscale_all_dim"),
        attention_factor=inner.optional_number("attention_factor"),
        truncate=inner.flag("truncate", default=True),
    )


__all__ = ["CheckpointError", "FAMILIES", "UnsupportedModelError", "load_spec", "spec_from_config"]
