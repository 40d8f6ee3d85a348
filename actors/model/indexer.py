"""DeepSeek-V3.2's lightning indexer: which past tokens a query's softmax runs over.

As transformers' ``DeepseekV32Indexer`` computes it, without the Hadamard rotation and the fp8 of the first release.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from .linear import linear
from .reader import TensorReader
from .rope import RopeTable
from .spec import IndexerSpec, MoEDecoderSpec

KEY_EPS = 1e-6
MAX_SCORES = 1 << 24
"""fp32 scores [queries, heads, tokens] computed at once: 64 MiB."""


@dataclass(frozen=True, slots=True)
class IndexerWeights:
    """One layer; Hi heads of width di. query_up: [Hi di, rq]; key: [di, D]; key_norm, key_norm_bias: [di] (a true
    LayerNorm); head_weights: [Hi, D], fp32 in an fp16 model, as transformers keeps it.
    """

    query_up: Tensor
    key: Tensor
    key_norm: Tensor
    key_norm_bias: Tensor
    head_weights: Tensor


@dataclass(frozen=True, slots=True)
class IndexQueries:
    """What T rows ask the indexer's keys. query: [T, Hi, di]; weights: fp32 [T, Hi], what each head's score counts."""

    query: Tensor
    weights: Tensor
    top_k: int

    def of(self, which: Tensor | slice) -> IndexQueries:
        """Those of some rows; copies of them, unless ``which`` is a slice."""
        return IndexQueries(self.query[which], self.weights[which], self.top_k)

    def one(self, row: int) -> IndexQueries:
        """Those of one row, copied: products of one row depend on the operands' alignment (see linear)."""
        return IndexQueries(self.query[row : row + 1].clone(), self.weights[row : row + 1].clone(), self.top_k)

    def choose(self, keys: Tensor, mask: Tensor | None) -> Tensor:
        """The ``top_k`` of each row's own keys, ascending. keys: [T, t, di], t > top_k, mask: bool [T, t] or None.

        Returns int64 [T, top_k]. Where a mask leaves fewer than top_k, masked ones make up the rest; among equal
        scores the choice is that of torch.topk.
        """
        scores = _scores(self.query, self.weights, keys)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.topk(self.top_k, dim=-1).indices.sort(dim=-1).values

    def choose_causal(self, keys: Tensor, context: int) -> Tensor:
        """As :meth:`choose` for consecutive rows of one sequence, the first of which follows ``context`` tokens.

        keys: [context + T, di], more than top_k. Row i sees 0 .. context + i; if that is less than top_k, all of these
        are among the chosen. No order. Memory beyond the result [T, top_k] is bounded.
        """
        rows, total = self.query.shape[0], keys.shape[0]
        chosen = torch.arange(self.top_k, device=keys.device).repeat(rows, 1)
        wide = keys.to(torch.float32)
        step = max(1, MAX_SCORES // (total * self.query.shape[1]))
        for start in range(max(0, self.top_k - context), rows, step):
            stop = min(start + step, rows)
            # All tokens take part, those to come with -inf: of equal scores topk then chooses as in transformers.
            scores = keys.new_full((stop - start, total), float("-inf"), dtype=torch.float32)
            seen = scores[:, : context + stop]
            seen.copy_(_scores(self.query[start:stop], self.weights[start:stop], wide[: context + stop]))
            last = torch.arange(context + start, context + stop, device=keys.device)
            seen.masked_fill_(torch.arange(context + stop, device=keys.device) > last[:, None], float("-inf"))
            chosen[start:stop] = scores.topk(self.top_k, dim=-1).indices
        return chosen


class Indexer:
    """The indexer of one attention layer."""

    def __init__(self, spec: IndexerSpec, weights: IndexerWeights, rope: RopeTable, row_block: int = 0) -> None:
        self._spec = spec
        self._weights = weights
        self._rope = rope
        self._row_block = row_block

    @classmethod
    def load(
        cls, spec: MoEDecoderSpec, indexer: IndexerSpec, read: TensorReader, layer: int, rope: RopeTable, row_block: int
    ) -> Indexer:
        """Read the weights of layer ``layer``. Raises CheckpointError."""

        def name(tensor: str) -> str:
            return spec.names.attention(layer, f"indexer.{tensor}")

        width = indexer.head_dim
        head_weights = read(name("weights_proj.weight"), (indexer.heads, spec.d_model))
        weights = IndexerWeights(
            query_up=read(name("wq_b.weight"), (indexer.heads * width, spec.attn.q_lora_rank or 0)),
            key=read(name("wk.weight"), (width, spec.d_model)),
            key_norm=read(name("k_norm.weight"), (width,)),
            key_norm_bias=read(name("k_norm.bias"), (width,)),
            head_weights=head_weights.float() if head_weights.dtype == torch.float16 else head_weights,
        )
        return cls(indexer, weights, rope, row_block)

    def project(self, x: Tensor, latent: Tensor, positions: Tensor) -> tuple[IndexQueries, Tensor]:
        """The queries of the normed rows x [T, D], and their keys [T, di] for the cache.

        latent: [T, rq], the rows' normed low-rank queries; positions: int64 [T].
        """
        weights, spec = self._weights, self._spec
        query = linear(latent, weights.query_up, row_block=self._row_block).unflatten(-1, (spec.heads, -1))
        key = linear(x, weights.key, row_block=self._row_block)
        key = layer_norm(key, (spec.head_dim,), weights.key_norm, weights.key_norm_bias, KEY_EPS)
        counts = linear(x.to(weights.head_weights.dtype), weights.head_weights, row_block=self._row_block)
        queries = IndexQueries(
            query=self._rope.apply_half(query, positions),
            weights=counts.to(torch.float32) * spec.heads**-0.5,
            top_k=spec.top_k,
        )
        return queries, self._rope.apply_half(key.unsqueeze(1), positions).squeeze(1)


def _scores(query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Sum over heads of weight x relu(scaled product), in fp32. query: [T, Hi, di], weights: fp32 [T, Hi], keys: [T, t,
    di], or [t, di] for all rows; returns fp32 [T, t].
    """
    products = torch.matmul(query.to(torch.float32), keys.to(torch.float32).transpose(-1, -2))
    heads = products.mul_(query.shape[-1] ** -0.5).relu_()
    return torch.matmul(weights.unsqueeze(-2), heads).squeeze(-2)
