"""The residual rows of a batch on their way through the layers: attention's half of each, by kernels or by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import Tensor

from actors.native.attention_layer import NativeLayer, NativeRows

from .attention import PagedAttention
from .batch import StepBatch
from .kv_cache import KVCache
from .linear import native
from .norm import LayerNorms, rms_norm


class LayerRows(Protocol):
    """``x``: the residual rows [T, D] behind the last layer's attention."""

    x: Tensor

    def attend(self, layer: int, more: Sequence[Tensor]) -> Tensor:
        """Add ``more`` to the rows, none, one tensor [T, D] or the sum of two, and what the layer's attention makes of
        them. Returns them normed for its MLP, [T, D], valid until the next call. Raises IndexError for positions or
        slots that do not exist."""


class LayerPasses:
    """How batches pass through the attention of all layers."""

    def __init__(self, attention: PagedAttention, norms: Sequence[LayerNorms], eps: float, row_block: int) -> None:
        self._attention = attention
        self._norms = norms
        self._eps = eps
        self._row_block = row_block
        self._native: WeakKeyDictionary[KVCache, list[NativeLayer] | None] = WeakKeyDictionary()

    def rows(self, x: Tensor, batch: StepBatch, cache: KVCache) -> LayerRows:
        """x: [T, D], the embedded tokens of ``batch``, which are used up. Those that the kernels' products serve all
        the way pass through them in one call a layer."""
        layers = self._layers(cache) if native(x.shape[0], self._row_block, x) else None
        paged = self._attention.paged(batch, cache) if layers else None
        if layers is None or paged is None or not isinstance(paged.rows, slice):
            return TorchRows(x, self._attention, self._norms, self._eps, batch, cache)
        where = batch.positions, batch.slots, paged.spans, paged.tables, cache.block_size
        return NativeRows(layers, x, *where)

    def _layers(self, cache: KVCache) -> list[NativeLayer] | None:
        if cache not in self._native:
            self._native[cache] = self._attention.native_layers(self._norms, self._eps, cache)
        return self._native[cache]


class TorchRows:
    """Operation by operation."""

    def __init__(
        self,
        x: Tensor,
        attention: PagedAttention,
        norms: Sequence[LayerNorms],
        eps: float,
        batch: StepBatch,
        cache: KVCache,
    ) -> None:
        self.x = x
        self._attention = attention
        self._norms = norms
        self._eps = eps
        self._batch = batch
        self._cache = cache

    def attend(self, layer: int, more: Sequence[Tensor]) -> Tensor:
        """See :class:`LayerRows`."""
        norms = self._norms[layer]
        self.x = added(self.x, more)
        normed = rms_norm(self.x, norms.input, self._eps)
        self.x = self.x + self._attention.forward(layer, normed, self._batch, self._cache)
        return rms_norm(self.x, norms.post, self._eps)


def added(x: Tensor, more: Sequence[Tensor]) -> Tensor:
    """x and the sum of ``more``, of at most two; each sum is rounded."""
    if not more:
        return x
    first, *rest = more
    for other in rest:
        first = first + other
    return x + first
