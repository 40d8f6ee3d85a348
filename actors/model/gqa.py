"""Grouped-query attention (arXiv 2305.13245), with optional norms of q and k."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from actors.native.attention import attention
from actors.native.attention_layer import Common, GroupedLayer, NativeLayer
from actors.native.matrix import Product, address

from .attention import PagedAttention, Planes, Queries, softmax_scores
from .batch import PagedRows
from .block_attention import Sight, block_attention
from .kv_cache import KVCache
from .linear import Matrix, linear
from .norm import rms_norm
from .parallel import load_each
from .reader import TensorReader
from .rope import RopeTable
from .spec import MoEDecoderSpec


@dataclass(frozen=True, slots=True)
class GqaWeights:
    """One layer. qkv: [(H + 2G) d, D], the rows of q, k and v under one another; out: [D, H d].

    q_norm and k_norm: [d] each, or [H d] and [G d] if the whole projected vector is normed.
    """

    qkv: Matrix
    qkv_bias: Tensor | None
    out: Matrix
    out_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


class GroupedQueryAttention(PagedAttention):
    """The cache keeps rotated k and v, each [G, d] a token."""

    def __init__(self, spec: MoEDecoderSpec, layers: list[GqaWeights], rope: RopeTable, row_block: int = 0) -> None:
        super().__init__(spec.attn, spec.attn.head_dim, rope, row_block)
        self._eps = spec.rms_eps
        self._layers = layers

    @classmethod
    def load(cls, spec: MoEDecoderSpec, read: TensorReader, rope: RopeTable, row_block: int = 0) -> Self:
        """Read the attention weights of all layers. Raises CheckpointError."""
        layers = load_each(lambda layer: _load_layer(spec, read, layer), range(spec.n_layers))
        return cls(spec, layers, rope, row_block)

    def _parts(self, layer: int) -> tuple[list[tuple[Matrix, Tensor | None]], list[Tensor]]:
        weights = self._layers[layer]
        norms = [norm for norm in (weights.q_norm, weights.k_norm) if norm is not None]
        return [(weights.qkv, weights.qkv_bias), (weights.out, weights.out_bias)], norms

    def _native_layer(self, layer: int, common: Common, cache: KVCache) -> NativeLayer:
        weights, attn = self._layers[layer], self._attn
        norms = weights.q_norm, weights.k_norm
        runs = [0 if norm is None else norm.shape[0] for norm in norms]
        planes = [plane.data_ptr() for plane in cache.planes(layer)]
        clip = math.inf if attn.clip is None else attn.clip
        qkv = Product.of(weights.qkv, weights.qkv_bias)
        names = *map(address, norms), *runs, *planes, attn.kv_heads, attn.head_dim, clip
        return NativeLayer("grouped_layer", GroupedLayer(common, qkv, *names))

    def _project(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Queries, Planes]:
        weights, attn = self._layers[layer], self._attn
        qkv = linear(x, weights.qkv, weights.qkv_bias, self._row_block)
        heads = qkv.view(x.shape[0], -1, attn.head_dim)
        query, key, value = heads.split((attn.heads, attn.kv_heads, attn.kv_heads), dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            query, key = self._normed(query, weights.q_norm), self._normed(key, weights.k_norm)
        if attn.clip is not None:
            query, key, value = (part.clamp(-attn.clip, attn.clip) for part in (query, key, value))
        return Queries(self._rope.apply(query, positions)), (self._rope.apply(key, positions), value)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, h, d] with each run of as many numbers as ``weight`` has normed: a head, or all of them."""
        if weight.shape[0] == x.shape[2]:
            return rms_norm(x, weight, self._eps)
        return rms_norm(x.flatten(1), weight, self._eps).view(x.shape)

    def _attend_paged(self, layer: int, query: Tensor, paged: PagedRows, cache: KVCache) -> Tensor:
        key, value = cache.planes(layer)
        where = paged.spans, paged.tables, cache.block_size
        return attention(query, (key,), value, *where, self._attn.scale, self._window(layer))

    def _attend_rows(self, layer: int, query: Tensor, past: Planes, mask: Tensor | None) -> Tensor:
        key, value = past
        grouped = query.unflatten(1, (self._attn.kv_heads, -1))
        scores = torch.matmul(grouped, key.permute(0, 2, 3, 1))
        shares = softmax_scores(scores, self._attn.scale, mask)
        return torch.matmul(shares, value.transpose(1, 2)).flatten(1, 2)

    def _attend_block(self, layer: int, query: Tensor, past: Planes, sight: Sight) -> Tensor:
        key, value = past
        return block_attention(query, key, value, sight.tiles(query.shape[1], query.device), self._attn.scale)

    def _output(self, layer: int, heads: Tensor) -> Tensor:
        return linear(heads, self._layers[layer].out, self._layers[layer].out_bias, self._row_block)


def _load_layer(spec: MoEDecoderSpec, read: TensorReader, layer: int) -> GqaWeights:
    attn = spec.attn
    rows = {
        "q_proj": attn.heads * attn.head_dim,
        "k_proj": attn.kv_heads * attn.head_dim,
        "v_proj": attn.kv_heads * attn.head_dim,
    }

    def name(tensor: str) -> str:
        return spec.names.attention(layer, tensor)

    qkv = read.projection((name(f"{part}.weight"), (n, spec.d_model)) for part, n in rows.items())
    bias = read.stacked((name(f"{part}.bias"), (n,)) for part, n in rows.items()) if attn.qkv_bias else None
    full = attn.qk_norm == "full"
    q_norm, k_norm = (rows["q_proj"], rows["k_proj"]) if full else (attn.head_dim, attn.head_dim)
    return GqaWeights(
        qkv=qkv,
        qkv_bias=bias,
        out=read.projection([(name("o_proj.weight"), (spec.d_model, rows["q_proj"]))]),
        out_bias=read(name("o_proj.bias"), (spec.d_model,)) if attn.o_bias else None,
        q_norm=read(name("q_norm.weight"), (q_norm,)) if attn.qk_norm != "none" else None,
        k_norm=read(name("k_norm.weight"), (k_norm,)) if attn.qk_norm != "none" else None,
    )
