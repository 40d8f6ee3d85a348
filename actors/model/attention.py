"""What every attention kind does alike: write the cache, then attend segment by segment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from .batch import Segment, StepBatch
from .kv_cache import KVCache

Planes = tuple[Tensor, Tensor]
Form = Literal["auto", "rows", "block"]


class PagedAttention(ABC):
    """Skeleton of an attention strategy. A strategy projects, and attends in two forms.

    * *rows*: B queries of different sequences, each over its own past, all of it visible. Decodes.
    * *block*: n consecutive queries of one sequence, causal among themselves. Prefills.

    In the deterministic mode (``row_block > 0``) every position is computed alone in the rows form, over
    exactly its past: then neither batch mates nor the cutting of a prompt into chunks can change a bit of it,
    and a replay that prefills what was once decoded gets the same numbers. ``form`` fixes one form for all
    positions (tests compare).
    """

    form: Form = "auto"

    def __init__(self, row_block: int) -> None:
        self._row_block = row_block

    @torch.inference_mode()
    def forward(self, layer: int, x: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        """x: [T, D], normed rows of ``batch``; returns [T, D]. Writes the rows' planes into ``cache``."""
        query, planes = self._project(layer, x, batch.positions)
        cache.write(layer, batch.slots, *planes)
        heads = self._new_heads(x)
        grouped = self.form == "auto" and not self._row_block
        if grouped:
            for group in batch.decode_groups(cache.block_size):
                past = cache.read(layer, group.slots)
                heads[group.rows] = self._attend_rows(layer, query[group.rows], past, group.mask)
        for segment in batch.segments:
            if not (grouped and segment.length == 1):
                self._attend_segment(layer, query, segment, cache, heads)
        return self._output(layer, heads.flatten(1))

    def _attend_segment(self, layer: int, query: Tensor, segment: Segment, cache: KVCache, heads: Tensor) -> None:
        """Fill the segment's rows of ``heads`` [T, H, dv]."""
        first, second = cache.read(layer, segment.slots(cache.block_size))
        rows = slice(segment.start, segment.start + segment.length)
        if self.form == "block" or (self.form == "auto" and not self._row_block):
            heads[rows] = self._attend_block(layer, query[rows], (first, second), segment.context)
            return
        for i in range(segment.length):
            row, end = segment.start + i, segment.context + i + 1
            past = first[None, :end], second[None, :end]
            # A copy, since products of one row depend on the operands' alignment (see linear).
            heads[row] = self._attend_rows(layer, query[row : row + 1].clone(), past, None)[0]

    @abstractmethod
    def _project(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Planes]:
        """Rotated queries [T, H, d] of the rows x [T, D], and the planes that the cache keeps of them."""

    @abstractmethod
    def _new_heads(self, x: Tensor) -> Tensor:
        """An uninitialised [T, H, dv] for the heads' outputs."""

    @abstractmethod
    def _attend_rows(self, layer: int, query: Tensor, past: Planes, mask: Tensor | None) -> Tensor:
        """query: [B, H, d], past: two [B, t, ...], mask: bool [B, t] or None; returns [B, H, dv]."""

    @abstractmethod
    def _attend_block(self, layer: int, query: Tensor, past: Planes, context: int) -> Tensor:
        """query: [n, H, d], past: two [context + n, ...]; returns [n, H, dv]."""

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


def causal_attention(query: Tensor, key: Tensor, value: Tensor, context: int, scale: float) -> Tensor:
    """Query i sees keys 0 .. context + i. query: [n, H, d], key: [t, G, d], value: [t, G, dv], t = context +
    n.

    G divides H: query heads in order share a key head. Returns [n, H, dv].
    """
    n, total = query.shape[0], key.shape[0]
    mask = None
    if context:
        limits = torch.arange(context, total, device=query.device)
        mask = torch.arange(total, device=query.device) <= limits[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and n > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)
