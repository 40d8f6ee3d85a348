"""What one step computes: new tokens of several sequences, packed without padding."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_GATHER_TOKENS = 1 << 15
"""Cache slots that a group of decodes may gather at once: bounds the copy (1024 bf16 numbers: 64 MiB)."""


@dataclass(slots=True, eq=False)
class Segment:
    """Rows ``start .. start+length`` of the batch: the next ``length`` tokens of one sequence.

    ``context`` tokens of that sequence lie in the cache already. ``block_table`` (int64) lists the sequence's
    blocks in order; it must reach to token ``context + length``. It must not change
    afterwards: the slots are derived from it once and kept for all layers.
    """

    start: int
    length: int
    context: int
    block_table: Tensor
    _slots: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def end(self) -> int:
        """Tokens in the cache once this segment is computed."""
        return self.context + self.length

    def check(self, block_size: int) -> int:
        """The blocks that the tokens 0 .. end need. Raises ValueError for too short a block table."""
        needed = -(-self.end // block_size)
        if self.block_table.shape[0] < needed:
            held = self.block_table.shape[0]
            raise ValueError(f"block_table has {held} blocks, {self.end} tokens need {needed} of {block_size}")
        return needed

    def slots(self, block_size: int) -> Tensor:
        """Cache slots of the tokens 0 .. end, int64 [end]. Raises ValueError for too short a block table."""
        if block_size not in self._slots:
            needed = self.check(block_size)
            offsets = torch.arange(block_size, device=self.block_table.device)
            slots = (self.block_table[:needed, None] * block_size + offsets).flatten()
            self._slots[block_size] = slots[: self.end]
        return self._slots[block_size]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Segments of one token each, of similar context, to be computed together.

    rows: int64 [B], rows of the batch. slots: int64 [B, t], what the rows see. mask: bool [B, t], True where a slot
    belongs to the sequence, or None if all do; where it is False the slot repeats the row's first.
    """

    rows: Tensor
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Segments whose attention is computed together straight over the paged cache.

    rows: int64 [R], their rows of the batch, or a slice if they are all of it. spans: int64 [S, 4], each segment's
    first one among these rows, length and context, and where in ``tables`` (int64) its block table begins.
    """

    rows: Tensor | slice
    spans: Tensor
    tables: Tensor


@dataclass(slots=True, eq=False)
class StepBatch:
    """Prefills (whole or in chunks) and decodes of one step, ragged and packed.

    token_ids, positions, slots: int64 [T]; ``slots`` says where in the cache each new token goes (block *
    block_size + offset). ``output_rows``: int64 [S], the rows whose logits are wanted, in that order. Every
    row belongs to exactly one segment.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    segments: list[Segment]
    output_rows: Tensor
    _groups: dict[tuple[int, int | None], list[DecodeGroup]] = field(default_factory=dict, init=False, repr=False)
    _paged: dict[tuple[int, int], PagedRows | None] = field(default_factory=dict, init=False, repr=False)

    def decode_groups(self, block_size: int, window: int | None = None) -> list[DecodeGroup]:
        """All segments of length 1, each with the slots of its last ``window`` tokens (None: of all).

        Within a group their counts differ by less than a factor of two.
        """
        key = block_size, window
        if key not in self._groups:
            buckets: dict[int, list[Segment]] = defaultdict(list)
            for segment in self.segments:
                if segment.length == 1:
                    buckets[min(segment.end, window or segment.end).bit_length()].append(segment)
            groups = []
            for bits, bucket in sorted(buckets.items()):
                size = max(1, MAX_GATHER_TOKENS >> bits)
                groups += [_group(bucket[i : i + size], *key) for i in range(0, len(bucket), size)]
            self._groups[key] = groups
        return self._groups[key]

    def paged_rows(self, block_size: int, longest: int) -> PagedRows | None:
        """All segments of up to ``longest`` rows; None if there are none.

        Raises ValueError for too short a block table.
        """
        key = block_size, longest
        if key not in self._paged:
            wanted = [segment for segment in self.segments if segment.length <= longest]
            every = len(wanted) == len(self.segments)
            self._paged[key] = _paged_rows(wanted, block_size, every) if wanted else None
        return self._paged[key]


def _paged_rows(segments: list[Segment], block_size: int, every: bool) -> PagedRows:
    """``every``: these are all segments of the batch."""
    spans, packed, listed = [], 0, 0
    for segment in segments:
        segment.check(block_size)
        spans.append((segment.start if every else packed, segment.length, segment.context, listed))
        packed += segment.length
        listed += segment.block_table.shape[0]
    rows = slice(None) if every else torch.cat([torch.arange(one.start, one.start + one.length) for one in segments])
    tables = torch.cat([segment.block_table for segment in segments])
    return PagedRows(rows, torch.tensor(spans, dtype=torch.int64), tables)


def _group(segments: list[Segment], block_size: int, window: int | None) -> DecodeGroup:
    device = segments[0].block_table.device
    rows = torch.tensor([segment.start for segment in segments], dtype=torch.int64, device=device)
    slots = [segment.slots(block_size)[-(window or segment.end) :] for segment in segments]
    longest = max(len(row) for row in slots)
    if all(len(row) == longest for row in slots):
        return DecodeGroup(rows, torch.stack(slots), None)
    padded = torch.stack([torch.cat((row, row[:1].expand(longest - len(row)))) for row in slots])
    lengths = torch.tensor([len(row) for row in slots], device=device)
    return DecodeGroup(rows, padded, torch.arange(longest, device=device) < lengths[:, None])
