"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): expanded prefills, absorbed decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from actors.native.attention import attention, head_products
from actors.native.attention_layer import Common, LatentLayer, NativeLayer
from actors.native.matrix import Product, address

from .attention import PagedAttention, Planes, Queries, softmax_scores
from .batch import PagedRows
from .block_attention import Sight, block_attention
from .indexer import Indexer
from .kv_cache import KVCache
from .linear import Matrix, linear, native
from .norm import rms_norm
from .parallel import load_each
from .reader import TensorReader
from .rope import RopeTable
from .spec import MoEDecoderSpec

LATENT_EPS = 1e-6
"""Of the two norms inside: transformers builds them with the norm's default, not rms_norm_eps."""

MAX_ABSORBED = 512
"""Rows of a prompt's piece that are absorbed in the plain mode. That takes (2 r + dr) / (dn + dr + dv) times the
operations of the expanded form, 3.4 in DeepSeek's models, but nothing is expanded: with the kernel both took the same
time at some 1,000 rows, and at 16 rows after 2,000 tokens a tenth (bf16, AVX-512)."""

MAX_EXPANDED = 1 << 25
"""Numbers of expanded keys and values held at once (bf16: 64 MiB); with more, some heads are done after others."""

MAX_KEPT = 1 << 27
"""Bytes of a chunk's masks that are kept for all groups of heads; with more they are built anew for each."""


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """One layer; H heads, r = kv_lora_rank, rq = q_lora_rank.

    down: [rq + r + dr, D] (without q_lora_rank: [H (dn+dr) + r + dr, D]), what reads the hidden row; q_up:
    [H (dn+dr), rq]; key_up: [H, r, dn], transposed, and value_up: [H, dv, r], the halves of kv_b_proj; out: [D, H dv];
    indexer: DeepSeek-V3.2's, which reads the normed low-rank query and so exists only where there is one.
    """

    down: Matrix
    down_bias: Tensor | None
    q_norm: Tensor | None
    q_up: Matrix | None
    latent_norm: Tensor
    key_up: Tensor
    value_up: Tensor
    out: Matrix
    out_bias: Tensor | None
    indexer: Indexer | None = None


class LatentAttention(PagedAttention):
    """The cache keeps the normed latent c [r] and the rotated key k_r [dr] that all heads share.

    The paged and the rows form are the absorbed one (queries and outputs pass through kv_b_proj, the cache is used as
    it lies), the block form the expanded one (k = [W_UK c | k_r], v = W_UV c for every past token). A prompt in chunks
    expands its past once a chunk: 2 t r H (dn + dv) operations a layer for t tokens so far.
    """

    longest_paged = MAX_ABSORBED

    def __init__(self, spec: MoEDecoderSpec, layers: list[MlaWeights], rope: RopeTable, row_block: int = 0) -> None:
        super().__init__(spec.attn, spec.attn.v_dim, rope, row_block)
        self._layers = layers

    @classmethod
    def load(cls, spec: MoEDecoderSpec, read: TensorReader, rope: RopeTable, row_block: int = 0) -> Self:
        """Read the attention weights of all layers. Raises CheckpointError."""
        layers = load_each(lambda layer: _load_layer(spec, read, layer, rope, row_block), range(spec.n_layers))
        return cls(spec, layers, rope, row_block)

    def _parts(self, layer: int) -> tuple[list[tuple[Matrix, Tensor | None]], list[Tensor]]:
        weights = self._layers[layer]
        matrices: list[tuple[Matrix, Tensor | None]] = [(weights.down, weights.down_bias)]
        if weights.q_up is not None:
            matrices.append((weights.q_up, None))
        plain = [weights.latent_norm, weights.key_up, weights.value_up]
        if weights.q_norm is not None:
            plain.append(weights.q_norm)
        return [*matrices, (weights.out, weights.out_bias)], plain

    def _native_layer(self, layer: int, common: Common, cache: KVCache) -> NativeLayer:
        weights, attn = self._layers[layer], self._attn
        q_up = Product() if weights.q_up is None else Product.of(weights.q_up, None)
        plain = weights.q_norm, weights.latent_norm, weights.key_up, weights.value_up
        dims = attn.kv_lora_rank, attn.qk_nope_dim, attn.v_dim
        where = [address(part) for part in (*plain, *cache.planes(layer))]
        down = Product.of(weights.down, weights.down_bias)
        return NativeLayer("latent_layer", LatentLayer(common, down, q_up, *where, *dims, LATENT_EPS))

    def _project(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Queries, Planes]:
        weights, attn = self._layers[layer], self._attn
        down = linear(x, weights.down, weights.down_bias, self._row_block)
        kv_dim = attn.kv_lora_rank + attn.qk_rope_dim
        query, latent, key_rope = down.split((down.shape[1] - kv_dim, attn.kv_lora_rank, attn.qk_rope_dim), dim=1)
        if weights.q_norm is not None and weights.q_up is not None:
            query = rms_norm(query, weights.q_norm, LATENT_EPS)
            index = None if weights.indexer is None else weights.indexer.project(x, query, positions)
            query = linear(query, weights.q_up, row_block=self._row_block)
        else:
            index = None
        nope, rope = query.unflatten(-1, (attn.heads, -1)).split((attn.qk_nope_dim, attn.qk_rope_dim), dim=-1)
        query = torch.cat((nope, self._rope.apply(rope, positions)), dim=-1)
        key_rope = self._rope.apply(key_rope.unsqueeze(1), positions).squeeze(1)
        planes = rms_norm(latent, weights.latent_norm, LATENT_EPS), key_rope
        if index is None:
            return Queries(query), planes
        return Queries(query, index[0]), (*planes, index[1])

    def _attend_paged(self, layer: int, query: Tensor, paged: PagedRows, cache: KVCache) -> Tensor:
        """Absorbed, as the rows form."""
        weights, attn = self._layers[layer], self._attn
        rows, rank, nope = query.shape[0], attn.kv_lora_rank, attn.qk_nope_dim
        absorbed = query.new_empty(rows, attn.heads, rank + attn.qk_rope_dim)
        absorbed[..., rank:] = query[..., nope:]
        self._per_head(query[..., :nope], weights.key_up, absorbed[..., :rank])
        latent, key_rope = [plane.unsqueeze(1) for plane in cache.planes(layer)]
        where = paged.spans, paged.tables, cache.block_size
        mixed = attention(absorbed, (latent, key_rope), latent, *where, attn.scale, self._window(layer))
        out = query.new_empty(rows, attn.heads, attn.v_dim)
        self._per_head(mixed, weights.value_up, out)
        return out

    def _per_head(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """``out[:, h] = x[:, h] @ weight[h].T``: x [R, H, K], weight [H, N, K], out [R, H, N]."""
        if native(x.shape[0], self._row_block, x, weight):
            head_products(x, weight, out)
        else:
            out.copy_(torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1))

    def _attend_rows(self, layer: int, query: Tensor, past: Planes, mask: Tensor | None) -> Tensor:
        """Absorbed: scores = (q_nope W_UK) c + q_rope k_r; out = W_UV (sum of shares x c)."""
        weights, attn = self._layers[layer], self._attn
        latent, key_rope = past
        nope, rope = query.split((attn.qk_nope_dim, attn.qk_rope_dim), dim=-1)
        absorbed = torch.bmm(nope.transpose(0, 1), weights.key_up.transpose(1, 2)).transpose(0, 1)
        scores = torch.bmm(absorbed, latent.transpose(1, 2)) + torch.bmm(rope, key_rope.transpose(1, 2))
        mixed = torch.bmm(softmax_scores(scores, attn.scale, mask), latent)
        return torch.bmm(mixed.transpose(0, 1), weights.value_up.transpose(1, 2)).transpose(0, 1)

    def _attend_block(self, layer: int, query: Tensor, past: Planes, sight: Sight) -> Tensor:
        """Expanded: keys and values of every past token, of as many heads at once as fit."""
        weights, attn = self._layers[layer], self._attn
        latent, key_rope = past
        tokens = latent.shape[0]
        out = query.new_empty(query.shape[0], attn.heads, attn.v_dim)
        step = max(1, MAX_EXPANDED // (tokens * (attn.head_dim + attn.v_dim)))
        # The masks are the same for all heads, and an indexer's are dear to build.
        kept = list(sight.tiles(step, query.device)) if step < attn.heads and sight.n * tokens <= MAX_KEPT else None
        for start in range(0, attn.heads, step):
            heads = slice(start, min(start + step, attn.heads))
            key_nope = torch.matmul(latent, weights.key_up[heads]).transpose(0, 1)
            shared = key_rope.unsqueeze(1).expand(-1, heads.stop - start, -1)
            value = torch.matmul(latent, weights.value_up[heads].transpose(1, 2)).transpose(0, 1)
            key = torch.cat((key_nope, shared), dim=-1)
            tiles = sight.tiles(step, query.device) if kept is None else kept
            out[:, heads] = block_attention(query[:, heads], key, value, tiles, attn.scale)
        return out

    def _output(self, layer: int, heads: Tensor) -> Tensor:
        return linear(heads, self._layers[layer].out, self._layers[layer].out_bias, self._row_block)


def _load_layer(spec: MoEDecoderSpec, read: TensorReader, layer: int, rope: RopeTable, row_block: int) -> MlaWeights:
    attn, d_model = spec.attn, spec.d_model

    def name(tensor: str) -> str:
        return spec.names.attention(layer, tensor)

    query_rows, rank = attn.heads * attn.head_dim, attn.q_lora_rank
    rows = {"q_proj" if rank is None else "q_a_proj": query_rows if rank is None else rank}
    rows["kv_a_proj_with_mqa"] = attn.kv_lora_rank + attn.qk_rope_dim
    key_up, value_up = _load_up(spec, read, name("kv_b_proj.weight"))
    return MlaWeights(
        down=read.projection((name(f"{part}.weight"), (n, d_model)) for part, n in rows.items()),
        down_bias=_load_down_bias(spec, read, layer) if attn.qkv_bias else None,
        q_norm=None if rank is None else read(name("q_a_layernorm.weight"), (rank,)),
        q_up=None if rank is None else read.projection([(name("q_b_proj.weight"), (query_rows, rank))]),
        latent_norm=read(name("kv_a_layernorm.weight"), (attn.kv_lora_rank,)),
        key_up=key_up,
        value_up=value_up,
        out=read.projection([(name("o_proj.weight"), (d_model, attn.heads * attn.v_dim))]),
        out_bias=read(name("o_proj.bias"), (d_model,)) if attn.o_bias else None,
        indexer=Indexer.load(spec, attn.indexer, read, layer, rope, row_block) if attn.indexer else None,
    )


def _load_up(spec: MoEDecoderSpec, read: TensorReader, name: str) -> tuple[Tensor, Tensor]:
    """kv_b_proj, whose rows are per head [k_nope | v], as transposed W_UK [H, r, dn] and W_UV [H, dv, r]: each output's
    numbers side by side, as the kernels want them."""
    attn = spec.attn
    up = read(name, (attn.heads * (attn.qk_nope_dim + attn.v_dim), attn.kv_lora_rank))
    key_up, value_up = up.unflatten(0, (attn.heads, -1)).split((attn.qk_nope_dim, attn.v_dim), dim=1)
    return key_up.transpose(1, 2).contiguous(), value_up.contiguous()


def _load_down_bias(spec: MoEDecoderSpec, read: TensorReader, layer: int) -> Tensor:
    """The biases of q_a_proj and kv_a_proj_with_mqa. A q_proj without low rank never has one: zeros."""
    attn = spec.attn
    kv = read(spec.names.attention(layer, "kv_a_proj_with_mqa.bias"), (attn.kv_lora_rank + attn.qk_rope_dim,))
    if attn.q_lora_rank is None:
        return torch.cat((kv.new_zeros(attn.heads * attn.head_dim), kv))
    return torch.cat((read(spec.names.attention(layer, "q_a_proj.bias"), (attn.q_lora_rank,)), kv))
