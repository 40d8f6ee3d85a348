"""The inner part of the block form: consecutive queries of one sequence over its keys and values, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_MASK = 1 << 22
"""Elements of a mask [queries, tokens]: the fused kernels want it in the activation dtype, so 8 to 16 MiB."""

MAX_SCORES = 1 << 26
"""Elements of a mask times heads, except on the CPU: torch may fall back to a kernel that holds all scores in fp32
(256 MiB), which the CPU's fused kernel never does."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some queries, and the tokens that any of them can see.

    mask: bool [rows, keys], True where a query sees a token; None if all see all, or, if ``causal``, each query the
    tokens up to its own (there are as many tokens as queries then).
    """

    rows: slice
    keys: slice
    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Sight:
    """What ``n`` consecutive queries after ``context`` tokens see of the tokens 0 .. context + n.

    Query i sees the tokens up to context + i; of these the last ``window`` (None: all, which one that cuts nothing off
    becomes); of these the ``chosen`` ones: int64 [n, k] or None: all.
    """

    context: int
    n: int
    window: int | None = None
    chosen: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window >= self.context + self.n:
            object.__setattr__(self, "window", None)

    def tiles(self, heads: int, device: torch.device) -> Iterator[Tile]:
        """All queries in order, as many at a time as ``heads`` heads of them on ``device`` may be computed together."""
        if self.n > 1 and self.context == 0 and self.window is None and self.chosen is None:
            yield Tile(slice(0, self.n), slice(0, self.n), causal=True)
            return
        step = self._step(MAX_MASK if device.type == "cpu" else min(MAX_MASK, MAX_SCORES // heads))
        for start in range(0, self.n, step):
            stop = min(start + step, self.n)
            rows = slice(start, stop)
            keys = slice(first_seen(self.context + start, self.window), self.context + stop)
            yield Tile(rows, keys, self._mask(rows, keys, device))

    def _step(self, most: int) -> int:
        """Queries of a tile whose mask has at most ``most`` elements; one at least."""
        if self.window is None:
            return max(1, most // (self.context + self.n))
        width = max(self.window, 64)  # tiles much larger than the window would be masked for the most part
        return max(1, min(width, most // (2 * width)))

    def _mask(self, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
        if rows.stop - rows.start == 1 and self.chosen is None:
            return None
        last = torch.arange(self.context + rows.start, self.context + rows.stop, device=device)[:, None]
        tokens = torch.arange(keys.start, keys.stop, device=device)
        mask = tokens <= last
        if self.window is not None:
            mask &= tokens > last - self.window
        if self.chosen is not None:
            seen = mask.new_zeros(mask.shape[0], self.context + self.n).scatter_(1, self.chosen[rows], True)
            mask &= seen[:, keys]
        return mask


def first_seen(position: int, window: int | None) -> int:
    """The first token that a query at ``position`` sees."""
    return 0 if window is None else max(0, position + 1 - window)


def block_attention(query: Tensor, key: Tensor, value: Tensor, tiles: Iterable[Tile], scale: float) -> Tensor:
    """query: [n, H, d], key: [t, G, d], value: [t, G, dv], tiles: those of a :class:`Sight`; returns [n, H, dv].

    G divides H: query heads in order share a key head. What is held beside operands and result grows neither with
    the number of queries nor with that of tokens: a tile's mask, and on a GPU perhaps its scores for all H heads. A
    causal tile is left to torch as it is; its kernels hold no scores, unless a GPU has none for the operands' width.
    """
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    for tile in tiles:
        out[tile.rows] = _fused(query[tile.rows], key[tile.keys], value[tile.keys], tile, scale)
    return out


def _fused(query: Tensor, key: Tensor, value: Tensor, tile: Tile, scale: float) -> Tensor:
    """One tile. The query heads of a key head are a batch over it: ``enable_gqa`` with a mask has no fused kernel on
    GPUs. On the CPU a value narrower than the key has none, so it is padded there.
    """
    width, shared = value.shape[2], query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and width < query.shape[2]:
        value = torch.nn.functional.pad(value, (0, query.shape[2] - width))
    out = torch.nn.functional.scaled_dot_product_attention(
        query.unflatten(1, (-1, shared)).permute(2, 1, 0, 3),
        key.transpose(0, 1).expand(shared, -1, -1, -1),
        value.transpose(0, 1).expand(shared, -1, -1, -1),
        attn_mask=tile.mask,
        is_causal=tile.causal,
        scale=scale,
    )
    return out.permute(2, 1, 0, 3).flatten(1, 2)[..., :width]
