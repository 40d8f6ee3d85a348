"""What every attention kind does alike: write the cache, then attend segment by segment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .batch import DecodeGroup, Segment, StepBatch
from .indexer import IndexQueries
from .kv_cache import KVCache
from .spec import AttnSpec

Planes = tuple[Tensor, ...]
Form = Literal["auto", "rows", "block"]

ATTENDED = (0, 1)
"""The cache planes that attention itself reads."""

INDEXED = (2,)
"""The one that an indexer reads."""

MAX_MASK = 1 << 22
"""Elements of a mask [queries, tokens]: the fused kernels want it in the activation dtype, so 8 to 16 MiB."""


@dataclass(frozen=True, slots=True)
class Queries:
    """query: [T, H, d], rotated. index: what an indexer chooses by; None where all that is visible is seen."""

    query: Tensor
    index: IndexQueries | None = None

    def of(self, which: Tensor | slice | list[int]) -> Queries:
        """Those of some rows; copies of them, unless ``which`` is a slice."""
        return Queries(self.query[which], None if self.index is None else self.index.of(which))


@dataclass(frozen=True, slots=True)
class Sight:
    """What n consecutive queries after ``context`` tokens see of the tokens 0 .. context + n.

    Query i sees the tokens up to context + i; of these the last ``window`` (None: all); of these the ``chosen``
    ones: int64 [n, k] or None: all.
    """

    context: int
    window: int | None = None
    chosen: Tensor | None = None

    def is_causal(self, n: int) -> bool:
        """Whether it is the plain lower triangle."""
        narrowed = self.window is not None and self.window < n
        return self.context == 0 and self.chosen is None and not narrowed

    def tiles(self, n: int) -> Iterator[tuple[slice, slice]]:
        """The queries in parts, each with the tokens that any of them can see; bounds :meth:`mask`."""
        if self.window is None:
            step = max(1, MAX_MASK // (self.context + n))
        else:
            width = max(self.window, 64)  # tiles much larger than the window would be masked for the most part
            step = max(1, min(width, MAX_MASK // (2 * width)))
        for start in range(0, n, step):
            stop = min(start + step, n)
            yield slice(start, stop), slice(_first_seen(self.context + start, self.window), self.context + stop)

    def mask(self, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
        """bool [rows, keys], True where a query of the tile sees a token; None if all see all."""
        if rows.stop - rows.start == 1 and self.chosen is None:
            return None
        last = torch.arange(self.context + rows.start, self.context + rows.stop, device=device)[:, None]
        tokens = torch.arange(keys.start, keys.stop, device=device)
        mask = tokens <= last
        if self.window is not None:
            mask &= tokens > last - self.window
        if self.chosen is not None:
            tokens_in_all = self.context + self.chosen.shape[0]
            seen = mask.new_zeros(mask.shape[0], tokens_in_all).scatter_(1, self.chosen[rows], True)
            mask &= seen[:, keys]
        return mask


class PagedAttention(ABC):
    """Skeleton of an attention strategy. A strategy projects, and attends in two forms.

    * *rows*: B queries of different sequences, each over its own past, all of it visible. Decodes.
    * *block*: n consecutive queries of one sequence, causal among themselves. Prefills.

    In a layer with a window neither reads more of the cache than is seen. Where an indexer chooses, the rows form
    reads the chosen tokens alone; the block form reads all and masks. As long as everything visible would be chosen,
    the indexer's plane is not read and nothing is scored.

    In the deterministic mode (``row_block > 0``) every position is computed alone in the rows form, over
    exactly what it sees: then neither batch mates nor the cutting of a prompt into chunks can change a bit of it,
    and a replay that prefills what was once decoded gets the same numbers. ``form`` fixes one form for all
    positions (tests compare).
    """

    form: Form = "auto"

    def __init__(self, attn: AttnSpec, value_dim: int, row_block: int) -> None:
        self._attn = attn
        self._value_dim = value_dim
        self._row_block = row_block

    @torch.inference_mode()
    def forward(self, layer: int, x: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        """x: [T, D], normed rows of ``batch``; returns [T, D]. Writes the rows' planes into ``cache``."""
        queries, planes = self._project(layer, x, batch.positions)
        cache.write(layer, batch.slots, *planes)
        heads = x.new_empty(x.shape[0], self._attn.heads, self._value_dim)
        plain = self.form == "auto" and not self._row_block
        if plain:
            for group in batch.decode_groups(cache.block_size, self._window(layer)):
                heads[group.rows] = self._attend_group(layer, queries.of(group.rows), group, cache)
        attend = self._attend_chunk if plain or self.form == "block" else self._attend_singly
        for segment in batch.segments:
            if not (plain and segment.length == 1):
                rows = slice(segment.start, segment.start + segment.length)
                attend(layer, queries.of(rows), segment, cache, heads[rows])
        return self._output(layer, heads.flatten(1))

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
        """Fill the segment's ``heads`` [n, H, dv] in the block form."""
        window, index, chosen = self._window(layer), queries.index, None
        first = _first_seen(segment.context, window)
        slots = segment.slots(cache.block_size)[first:]
        if index is not None and len(slots) > index.top_k:
            (keys,) = cache.read(layer, slots, INDEXED)
            chosen = index.choose_causal(keys, segment.context)
        sight = Sight(segment.context - first, window, chosen)
        heads.copy_(self._attend_block(layer, queries.query, cache.read(layer, slots, ATTENDED), sight))

    def _attend_singly(self, layer: int, queries: Queries, segment: Segment, cache: KVCache, heads: Tensor) -> None:
        """Fill the segment's ``heads`` [n, H, dv], every position by itself in the rows form."""
        window, index = self._window(layer), queries.index
        first = _first_seen(segment.context, window)
        slots = segment.slots(cache.block_size)[first:]
        past = cache.read(layer, slots, ATTENDED)
        keys = cache.read(layer, slots, INDEXED)[0] if index is not None and len(slots) > index.top_k else None
        for i in range(segment.length):
            # Copies, since products of one row depend on the operands' alignment (see linear).
            own, end = queries.of([i]), segment.context + i + 1 - first
            start = _first_seen(end - 1, window)
            seen = tuple(plane[start:end].clone() if start else plane[:end] for plane in past)
            if keys is not None and own.index is not None and end > own.index.top_k:
                chosen = own.index.choose(keys[None, :end], None)[0]
                seen = tuple(plane.index_select(0, chosen) for plane in past)
            heads[i] = self._attend_rows(layer, own.query, tuple(plane[None] for plane in seen), None)[0]

    @abstractmethod
    def _project(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Queries, Planes]:
        """Queries of the rows x [T, D], and the planes that the cache keeps of them."""

    @abstractmethod
    def _attend_rows(self, layer: int, query: Tensor, past: Planes, mask: Tensor | None) -> Tensor:
        """query: [B, H, d], past: two [B, t, ...], mask: bool [B, t] or None; returns [B, H, dv]."""

    @abstractmethod
    def _attend_block(self, layer: int, query: Tensor, past: Planes, sight: Sight) -> Tensor:
        """query: [n, H, d], past: two [sight.context + n, ...]; returns [n, H, dv]."""

    @abstractmethod
    def _output(self, layer: int, heads: Tensor) -> Tensor:
        """heads: [T, H * dv]; returns [T, D]."""


def softmax_scores(scores: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis in fp32, cast back. scores: [B, ..., t], mask: bool [B, t] or None."""
    scaled = scores * scale
    if mask is not None:
        shape = (mask.shape[0], *(1,) * (scores.dim() - 2), mask.shape[1])
        scaled = scaled.masked_fill(~mask.view(shape), float("-inf"))
    return torch.softmax(scaled, dim=-1, dtype=torch.float32).to(scores.dtype)


def block_attention(query: Tensor, key: Tensor, value: Tensor, sight: Sight, scale: float) -> Tensor:
    """query: [n, H, d], key: [t, G, d], value: [t, G, dv], t = sight.context + n; returns [n, H, dv].

    G divides H: query heads in order share a key head. What is held beside operands and result grows neither with
    the number of queries nor with that of tokens, as long as d >= dv.
    """
    n = query.shape[0]
    if sight.is_causal(n):
        return _fused(query, key, value, None, n > 1, scale)
    out = query.new_empty(n, query.shape[1], value.shape[2])
    for rows, keys in sight.tiles(n):
        mask = sight.mask(rows, keys, query.device)
        out[rows] = _fused(query[rows], key[keys], value[keys], mask, False, scale)
    return out


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """As block_attention; with a narrower value torch would write out all scores, so it is padded."""
    width = value.shape[2]
    if width < query.shape[2]:
        value = torch.nn.functional.pad(value, (0, query.shape[2] - width))
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)[..., :width]


def _first_seen(position: int, window: int | None) -> int:
    """The first token that a query at ``position`` sees."""
    return 0 if window is None else max(0, position + 1 - window)
