"""Every tensor that a checkpoint of a model should hold: name and shape, from its description alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from .spec import MoEDecoderSpec

Part = Literal["embed", "head", "norm", "attention", "gate", "shared", "dense", "expert"]
"""``attention``: with its norms and its indexer; ``gate``: with the correction bias; ``shared``: with its gate."""

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"}

Shapes = Iterable[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor as it would lie on disk unquantised; some checkpoints call it by one of ``aliases`` instead."""

    name: str
    shape: tuple[int, ...]
    part: Part
    aliases: tuple[str, ...] = ()

    @property
    def projection(self) -> tuple[int, int] | None:
        """[N, K] of a matrix that an attention shard quantises at load if it is told to; else None."""
        stem = self.name.removesuffix(".weight").rpartition(".")[2]
        wide = self.part in ("head", "shared", "dense") and self.shape[0] > 1
        if len(self.shape) != 2 or not (wide or (self.part == "attention" and stem in _PROJECTIONS)):
            return None
        return self.shape[0], self.shape[1]

    @property
    def numel(self) -> int:
        """Its parameters."""
        return math.prod(self.shape)


def expected_tensors(spec: MoEDecoderSpec) -> Iterator[ExpectedTensor]:
    """All of them, the routed experts' too (layer by layer, three matrices each)."""
    yield from resident_tensors(spec)
    for layer in spec.moe_layers:
        for expert in range(spec.moe.n_experts):
            yield from expert_tensors(spec, layer, expert)


def stored_tensors(spec: MoEDecoderSpec, has: Callable[[str], bool]) -> Iterator[ExpectedTensor]:
    """:func:`expected_tensors` of a checkpoint that has the tensors that ``has`` says: the experts of a layer may be
    fused."""
    yield from resident_tensors(spec)
    for layer in spec.moe_layers:
        apart = [e for e in range(spec.moe.n_experts) if not spec.names.is_fused(layer, e, has)]
        if len(apart) < spec.moe.n_experts:
            yield from fused_tensors(spec, layer)
        for expert in apart:
            yield from expert_tensors(spec, layer, expert)


def fused_tensors(spec: MoEDecoderSpec, layer: int) -> Iterator[ExpectedTensor]:
    """A layer's routed experts under one another: (gate over up, down)."""
    count, inter, d_model = spec.moe.n_experts, spec.moe.inter, spec.d_model
    shapes = ((count, 2 * inter, d_model), (count, d_model, inter))
    return (
        ExpectedTensor(name, shape, "expert")
        for name, shape in zip(spec.names.fused_experts(layer), shapes, strict=True)
    )


def resident_tensors(spec: MoEDecoderSpec) -> Iterator[ExpectedTensor]:
    """All but the routed experts: what attention shards and routers hold."""
    table, names = (spec.vocab_size, spec.d_model), spec.names
    yield ExpectedTensor(names.embed, table, "embed")
    if not spec.tie_embeddings:
        yield ExpectedTensor(names.lm_head, table, "head")
    yield ExpectedTensor(names.final_norm, (spec.d_model,), "norm")
    for layer in range(spec.n_layers):
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield ExpectedTensor(names.layer(layer, norm), (spec.d_model,), "norm")
        for tensor, shape in _mla(spec) if spec.attn.kind == "mla" else _gqa(spec):
            yield ExpectedTensor(names.attention(layer, tensor), shape, "attention")
        yield from _moe(spec, layer) if spec.layer_kinds[layer] == "moe" else _dense(spec, layer)


def expert_tensors(spec: MoEDecoderSpec, layer: int, expert: int) -> Iterator[ExpectedTensor]:
    """One routed expert's (gate, up, down)."""
    shapes = _swiglu(spec.names.expert(layer, expert), spec.d_model, spec.moe.inter)
    return (ExpectedTensor(name, shape, "expert") for name, shape in shapes)


def _dense(spec: MoEDecoderSpec, layer: int) -> Iterator[ExpectedTensor]:
    for name, shape in _swiglu(spec.names.mlp(layer), spec.d_model, spec.dense_inter):
        yield ExpectedTensor(name, shape, "dense")


def _moe(spec: MoEDecoderSpec, layer: int) -> Iterator[ExpectedTensor]:
    moe, names = spec.moe, spec.names
    gate, *aliases = names.gate(layer)
    yield ExpectedTensor(gate, (moe.n_experts, spec.d_model), "gate", tuple(aliases))
    if moe.gate.bias:
        yield ExpectedTensor(names.gate_bias(layer), (moe.n_experts,), "gate")
    if moe.shared_inter:
        for name, shape in _swiglu(names.shared(layer), spec.d_model, moe.shared_inter):
            yield ExpectedTensor(name, shape, "shared")
        if moe.shared_gated:
            yield ExpectedTensor(names.shared_gate(layer), (1, spec.d_model), "shared")


def _swiglu(names: tuple[str, str, str], d_model: int, inter: int) -> Shapes:
    return zip(names, ((inter, d_model), (inter, d_model), (d_model, inter)), strict=True)


def _gqa(spec: MoEDecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    attn, d_model = spec.attn, spec.d_model
    query, key = attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim
    for part, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield f"{part}.weight", (rows, d_model)
        if attn.qkv_bias:
            yield f"{part}.bias", (rows,)
    if attn.qk_norm != "none":
        full = attn.qk_norm == "full"
        yield "q_norm.weight", (query if full else attn.head_dim,)
        yield "k_norm.weight", (key if full else attn.head_dim,)
    yield from _output(spec, query)


def _mla(spec: MoEDecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    attn, d_model, rank = spec.attn, spec.d_model, spec.attn.q_lora_rank
    query, latent = attn.heads * attn.head_dim, attn.kv_lora_rank + attn.qk_rope_dim
    if rank is None:
        yield "q_proj.weight", (query, d_model)
    else:
        yield "q_a_proj.weight", (rank, d_model)
        yield "q_a_layernorm.weight", (rank,)
        yield "q_b_proj.weight", (query, rank)
        if attn.qkv_bias:
            yield "q_a_proj.bias", (rank,)
    yield "kv_a_proj_with_mqa.weight", (latent, d_model)
    if attn.qkv_bias:
        yield "kv_a_proj_with_mqa.bias", (latent,)
    yield "kv_a_layernorm.weight", (attn.kv_lora_rank,)
    yield "kv_b_proj.weight", (attn.heads * (attn.qk_nope_dim + attn.v_dim), attn.kv_lora_rank)
    yield from _indexer(spec)
    yield from _output(spec, attn.heads * attn.v_dim)


def _indexer(spec: MoEDecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    indexer = spec.attn.indexer
    if indexer is not None:
        yield "indexer.wq_b.weight", (indexer.heads * indexer.head_dim, spec.attn.q_lora_rank or 0)
        yield "indexer.wk.weight", (indexer.head_dim, spec.d_model)
        yield "indexer.k_norm.weight", (indexer.head_dim,)
        yield "indexer.k_norm.bias", (indexer.head_dim,)
        yield "indexer.weights_proj.weight", (indexer.heads, spec.d_model)


def _output(spec: MoEDecoderSpec, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "o_proj.weight", (spec.d_model, width)
    if spec.attn.o_bias:
        yield "o_proj.bias", (spec.d_model,)
