"""What every attention kind does alike: write the cache, then attend segment by segment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from actors.native import products
from actors.native.attention_layer import Common, NativeLayer
from actors.native.matrix import Product

from .batch import DecodeGroup, PagedRows, Segment, StepBatch
from .block_attention import Sight, first_seen
from .indexer import IndexQueries
from .kv_cache import KVCache
from .linear import Matrix
from .norm import LayerNorms
from .reader import TensorReader
from .rope import RopeTable
from .spec import AttnSpec, MoEDecoderSpec

Planes = tuple[Tensor, ...]
Form = Literal["auto", "rows", "block"]

ATTENDED = (0, 1)
"""The cache planes that attention itself reads."""

INDEXED = (2,)
"""The one that an indexer reads."""


@dataclass(frozen=True, slots=True)
class Queries:
    """query: [T, H, d], rotated. index: what an indexer chooses by; None where all that is visible is seen."""

    query: Tensor
    index: IndexQueries | None = None

    def of(self, which: Tensor | slice) -> Queries:
        """Those of some rows; copies of them, unless ``which`` is a slice."""
        return Queries(self.query[which], None if self.index is None else self.index.of(which))


class PagedAttention(ABC):
    """Skeleton of an attention strategy. A strategy projects, and attends in three forms.

    * *paged*: all rows of some segments at once, by the package's own kernel straight over the cache. Decodes and
      prefills, but for those that are faster in the block form, where the kernel is usable.
    * *rows*: B queries of different sequences, each over those tokens of its past that it sees. Decodes elsewhere.
    * *block*: n consecutive queries of one sequence, causal among themselves. Prefills elsewhere.

    A window leaves out all but the last tokens: no form reads those before it. An indexer leaves out what it does
    not choose: the rows form reads the chosen tokens alone, the block form reads all and masks. As long as everything
    would be chosen, the indexer's plane is not read and nothing is scored.

    In the deterministic mode (``row_block > 0``) neither batch mates nor the cutting of a prompt into chunks can change
    a bit of a position, and a replay that prefills what was once decoded gets the same numbers. The paged form keeps
    this as it is, so all rows take it. Where it is not usable, or where an indexer chooses, every position is computed
    alone in the rows form, over exactly what it sees. ``form`` fixes one of torch's forms for all positions (tests
    compare).
    """

    form: Form = "auto"

    longest_paged: ClassVar[int | None] = None
    """Rows of a segment above which, in the plain mode, the block form is faster than the paged one; None: never."""

    def __init__(self, attn: AttnSpec, value_dim: int, rope: RopeTable, row_block: int) -> None:
        self._attn = attn
        self._rope = rope
        self._value_dim = value_dim
        self._row_block = row_block

    @classmethod
    @abstractmethod
    def load(cls, spec: MoEDecoderSpec, read: TensorReader, rope: RopeTable, row_block: int = 0) -> Self:
        """Read the attention weights of all layers. Raises CheckpointError."""

    @torch.inference_mode()
    def forward(self, layer: int, x: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        """x: [T, D], normed rows of ``batch``; returns [T, D]. Writes the rows' planes into ``cache``."""
        queries, planes = self._project(layer, x, batch.positions)
        cache.write(layer, batch.slots, *planes)
        return self._output(layer, self._attend(layer, queries, batch, cache).flatten(1))

    def native_layers(self, norms: Sequence[LayerNorms], eps: float, cache: KVCache) -> list[NativeLayer] | None:
        """Every layer with its ``norms`` and its part of ``cache`` as one call of the kernels; they must outlive it.

        None where these do not take the model: elsewhere than on the CPU, with an indexer, in other dtypes than fp32
        and bf16, with matrices that they do not multiply.
        """
        each = list(enumerate(norms))
        if not all(self._taken(layer, own, cache) for layer, own in each):
            return None
        return [self._native_layer(layer, self._common(layer, own, eps, cache), cache) for layer, own in each]

    def _taken(self, layer: int, norms: LayerNorms, cache: KVCache) -> bool:
        matrices, plain = self._parts(layer)
        planes, like = cache.planes(layer), norms.input
        if not products.usable(like, *[matrix for matrix, _ in matrices], *planes, *norms, *plain):
            return False
        return len(planes) == len(ATTENDED) and all(products.adds(bias, like, matrix) for matrix, bias in matrices)

    def _common(self, layer: int, norms: LayerNorms, eps: float, cache: KVCache) -> Common:
        (out, bias), slots = self._parts(layer)[0][-1], cache.n_blocks * cache.block_size
        numbers = norms.input.shape[0], self._attn.heads, slots, self._window(layer) or 0, eps, self._attn.scale
        return Common(*[norm.data_ptr() for norm in norms], Product.of(out, bias), self._rope.place, *numbers)

    def _attend(self, layer: int, queries: Queries, batch: StepBatch, cache: KVCache) -> Tensor:
        """The heads [T, H, dv] of all rows."""
        rows, plain, done = queries.query.shape[0], self.form == "auto" and not self._row_block, 0
        heads = queries.query.new_empty(rows, self._attn.heads, self._value_dim)
        if self._native(queries, cache.planes(layer)):
            done = self._longest(rows)
            paged = self.paged(batch, cache)
            if paged is not None:
                heads[paged.rows] = self._attend_paged(layer, queries.query[paged.rows], paged, cache)
        elif plain:
            done = 1
            for group in batch.decode_groups(cache.block_size, self._window(layer)):
                heads[group.rows] = self._attend_group(layer, queries.of(group.rows), group, cache)
        attend = self._attend_chunk if plain or self.form == "block" else self._attend_singly
        for segment in batch.segments:
            if segment.length > done:
                attend(layer, queries, segment, cache, heads)
        return heads

    def paged(self, batch: StepBatch, cache: KVCache) -> PagedRows | None:
        """The rows of ``batch`` that take the paged form where it serves; None if there are none."""
        if self.form != "auto":
            return None
        return batch.paged_rows(cache.block_size, self._longest(batch.token_ids.shape[0]))

    def _longest(self, rows: int) -> int:
        return rows if self._row_block or self.longest_paged is None else self.longest_paged

    def _native(self, queries: Queries, planes: Planes) -> bool:
        """Whether the paged form serves these queries. A model with an indexer never takes it: of a position, one form
        alone must decide."""
        return self.form == "auto" and queries.index is None and products.usable(queries.query, *planes)

    def _window(self, layer: int) -> int | None:
        return self._attn.windows[layer] if self._attn.windows else None

    def _attend_group(self, layer: int, queries: Queries, group: DecodeGroup, cache: KVCache) -> Tensor:
        """The group's heads [B, H, dv]."""
        slots, mask, index = group.slots, group.mask, queries.index
        if index is not None and slots.shape[1] > index.top_k:
            (keys,) = cache.read(layer, slots, INDEXED)
            chosen = index.choose(keys, mask)
            slots, mask = slots.gather(1, chosen), None if mask is None else mask.gather(1, chosen)
        return self._attend_rows(layer, queries.query, cache.read(layer, slots, ATTENDED), mask)

    def _attend_chunk(self, layer: int, queries: Queries, segment: Segment, cache: KVCache, heads: Tensor) -> None:
        """Fill the segment's rows of ``heads`` [T, H, dv] in the block form; ``queries`` are those of all T rows."""
        rows = slice(segment.start, segment.start + segment.length)
        own, window, chosen = queries.of(rows), self._window(layer), None
        first = first_seen(segment.context, window)
        slots = segment.slots(cache.block_size)[first:]
        if own.index is not None and len(slots) > own.index.top_k:
            (keys,) = cache.read(layer, slots, INDEXED)
            chosen = own.index.choose_causal(keys, segment.context)
        sight = Sight(segment.context - first, segment.length, window, chosen)
        heads[rows] = self._attend_block(layer, own.query, cache.read(layer, slots, ATTENDED), sight)

    def _attend_singly(self, layer: int, queries: Queries, segment: Segment, cache: KVCache, heads: Tensor) -> None:
        """Fill the segment's rows of ``heads`` [T, H, dv], every position by itself in the rows form.

        ``queries`` are those of all T rows. This runs once for each row and layer: what it does on the way counts.
        """
        window, index = self._window(layer), queries.index
        first = first_seen(segment.context, window)
        slots = segment.slots(cache.block_size)[first:]
        past = cache.read(layer, slots, ATTENDED)
        keys = cache.read(layer, slots, INDEXED)[0] if index is not None and len(slots) > index.top_k else None
        for i in range(segment.length):
            row, end = segment.start + i, segment.context + i + 1 - first
            if keys is not None and index is not None and end > index.top_k:
                chosen = index.one(row).choose(keys[None, :end], None)[0]
                seen = tuple([plane.index_select(0, chosen) for plane in past])
            else:
                seen = _between(past, first_seen(end - 1, window), end)
            own = queries.query.narrow(0, row, 1).clone()  # a product of one row depends on its alignment (see linear)
            heads[row] = self._attend_rows(layer, own, (seen[0].unsqueeze(0), seen[1].unsqueeze(0)), None)[0]

    @abstractmethod
    def _parts(self, layer: int) -> tuple[list[tuple[Matrix, Tensor | None]], list[Tensor]]:
        """The layer's matrices with their biases, the output projection last; and its other weights."""

    @abstractmethod
    def _native_layer(self, layer: int, common: Common, cache: KVCache) -> NativeLayer:
        """See :meth:`native_layers`; the kernels take all that it names."""

    @abstractmethod
    def _project(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Queries, Planes]:
        """Queries of the rows x [T, D], and the planes that the cache keeps of them."""

    @abstractmethod
    def _attend_paged(self, layer: int, query: Tensor, paged: PagedRows, cache: KVCache) -> Tensor:
        """query: [R, H, d], those of the rows ``paged``; returns [R, H, dv]."""

    @abstractmethod
    def _attend_rows(self, layer: int, query: Tensor, past: Planes, mask: Tensor | None) -> Tensor:
        """query: [B, H, d], past: two [B, t, ...], mask: bool [B, t] or None; returns [B, H, dv]."""

    @abstractmethod
    def _attend_block(self, layer: int, query: Tensor, past: Planes, sight: Sight) -> Tensor:
        """query: [n, H, d], past: two [sight.context + n, ...], n = sight.n; returns [n, H, dv]."""

    @abstractmethod
    def _output(self, layer: int, heads: Tensor) -> Tensor:
        """heads: [T, H * dv]; returns [T, D]."""


def _between(past: Planes, start: int, end: int) -> Planes:
    """The tokens ``start .. end``, at the head of their memory: products of one row depend on its alignment."""
    if start:
        return tuple([plane[start:end].clone() for plane in past])
    return past if end == past[0].shape[0] else tuple([plane.narrow(0, 0, end) for plane in past])


def softmax_scores(scores: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis in fp32, cast back. scores: [B, ..., t], mask: bool [B, t] or None."""
    scaled = scores * scale
    if mask is not None:
        shape = (mask.shape[0], *(1,) * (scores.dim() - 2), mask.shape[1])
        scaled = scaled.masked_fill(~mask.view(shape), float("-inf"))
    return torch.softmax(scaled, dim=-1, dtype=torch.float32).to(scores.dtype)
