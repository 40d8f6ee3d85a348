"""The rotary embedding that a configuration describes."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from actors.model.config_fields import LARGEST, Fields
from actors.model.spec import Precision, RopeSpec, RopeType
from actors.model.yarn import magnitude

ROPE_TYPES = ("default", "yarn")


def rope_spec(
    f: Fields,
    head_dim: int,
    interleaved: bool = False,
    precision: Precision = "model",
    partial: bool = False,
    key: str = "head_dim",
) -> RopeSpec:
    """Rope over heads of ``head_dim`` (``key`` says so), or over the share of them that the configuration names if
    ``partial``.

    As in transformers: rope_scaling wins over rope_parameters, a key inside over the same key beside.
    """
    inner = f.sub("rope_scaling" if f.get("rope_scaling") else "rope_parameters")
    theta = inner.number("rope_theta", default=f.number("rope_theta", default=1e4), above=1.0)
    f.require(head_dim % 2 == 0 or partial, key, "an even number: rotary embedding takes pairs")
    share = inner.number("partial_rotary_factor", default=f.number("partial_rotary_factor", default=1.0))
    dim = int(head_dim * share)
    f.require(partial or share == 1.0, "partial_rotary_factor", f"1.0, got {share}")
    f.require(
        share <= 1.0 and dim >= 2 and dim % 2 == 0,
        "partial_rotary_factor",
        f"a share of the head width {head_dim} that gives an even count, got {share} of it = {dim}",
    )
    type_key = "rope_type" if inner.get("rope_type") is not None else "type"
    kind = cast(RopeType, inner.one_of(type_key, ROPE_TYPES, default="default"))
    spec = RopeSpec(type=kind, theta=theta, dim=dim, interleaved=interleaved, precision=precision)
    return spec if kind == "default" else _yarn(f, inner, spec)


def mla_scale(qk_dim: int, rope: RopeSpec) -> float:
    """DeepSeek multiplies the softmax scale by mscale(factor, mscale_all_dim) squared when YaRN is on."""
    scale: float = qk_dim**-0.5
    if rope.type == "default" or not rope.mscale_all_dim:
        return scale
    return scale * magnitude(rope.factor, rope.mscale_all_dim) ** 2


def context_length(f: Fields, rope: RopeSpec) -> int:
    """How many tokens have positions. Model cards switch YaRN on and leave ``max_position_embeddings`` as it was."""
    stated = f.integer("max_position_embeddings")
    if rope.type != "yarn":
        return stated
    stretched = round(rope.factor * rope.original_max_positions)
    most = LARGEST["max_position_embeddings"]
    f.require(stretched <= most, "rope_scaling", f"a factor that makes at most {most} positions, got {stretched}")
    return max(stated, stretched)


def _yarn(f: Fields, inner: Fields, base: RopeSpec) -> RopeSpec:
    positions = f.integer("max_position_embeddings")
    original = _original(f, inner, positions)
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


def _original(f: Fields, inner: Fields, positions: int) -> int:
    """The context before YaRN. For this one key what stands beside wins over what stands inside, as in transformers."""
    key = "original_max_position_embeddings"
    holder = f if f.get(key) is not None else inner
    count = holder.number(key, default=positions)
    holder.require(count.is_integer(), key, "a whole number > 0")
    return int(count)
