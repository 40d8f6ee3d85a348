"""A decoder layer from its residual rows to the rows that its MLP reads, in one call.

Decodes on the CPU are small products, between which Python and torch took as long as the products. Numbers are those of
the operations one by one (``actors/model``), but for a norm's sum of squares, which has an order of its own. A row's
results depend on that row and its past alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .library import library
from .matrix import KINDS, Product

_Pointer, _Whole, _Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Rope(ctypes.Structure):
    """Tables of cos and sin [positions, dim / 2], fp32 if ``wide``, else in the rows' dtype."""

    _fields_ = [
        *[(name, _Pointer) for name in ("cos", "sin")],
        *[(name, _Whole) for name in ("positions", "dim", "wide", "interleaved")],
    ]


class Common(ctypes.Structure):
    """What all kinds of attention have. ``slots``: of the cache; ``window``: 0 for none."""

    _fields_ = [
        *[(name, _Pointer) for name in ("input_norm", "post_norm")],
        ("out", Product),
        ("rope", Rope),
        *[(name, _Whole) for name in ("d", "heads", "slots", "window")],
        *[(name, _Real) for name in ("eps", "scale")],
    ]


class GroupedLayer(ctypes.Structure):
    """Grouped-query attention; a norm's run: as many numbers as it has. ``clip``: infinity for none."""

    _fields_ = [
        ("common", Common),
        ("qkv", Product),
        *[(name, _Pointer) for name in ("q_norm", "k_norm")],
        *[(name, _Whole) for name in ("q_run", "k_run")],
        *[(name, _Pointer) for name in ("key", "value")],
        *[(name, _Whole) for name in ("groups", "head_dim")],
        ("clip", _Real),
    ]


class LatentLayer(ctypes.Structure):
    """Multi-head latent attention; without a low-rank query ``q_norm`` and ``q_up`` are empty."""

    _fields_ = [
        ("common", Common),
        *[(name, Product) for name in ("down", "q_up")],
        *[(name, _Pointer) for name in ("q_norm", "latent_norm", "key_up", "value_up", "latent", "key_rope")],
        *[(name, _Whole) for name in ("rank", "nope_dim", "value_dim")],
        ("latent_eps", _Real),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _Pointer) for name in ("x", "normed", "positions", "slots", "spans", "tables")],
        *[(name, _Whole) for name in ("rows", "n_spans", "block_size")],
    ]


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer's weights and planes of the cache, as the kernels are told of them. They must outlive this."""

    kind: Literal["grouped_layer", "latent_layer"]
    fields: GroupedLayer | LatentLayer


class NativeRows:
    """The residual rows of one batch while they pass through the ``layers``.

    x: [T, D] on the CPU, contiguous, changed in place; positions, slots: int64 [T]; spans, tables: as for
    :func:`actors.native.attention.attention`, of all rows.
    """

    def __init__(
        self,
        layers: Sequence[NativeLayer],
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        spans: Tensor,
        tables: Tensor,
        block_size: int,
    ) -> None:
        kernels = library()
        assert kernels is not None
        self.x = x
        self._layers = layers
        self._normed = torch.empty_like(x)
        self._kernels = kernels
        self._held = positions.contiguous(), slots.contiguous(), spans.contiguous(), tables.contiguous()
        addresses = [tensor.data_ptr() for tensor in (x, self._normed, *self._held)]
        self._step = _Step(*addresses, x.shape[0], spans.shape[0], block_size)

    def attend(self, layer: int, more: Sequence[Tensor]) -> Tensor:
        """Add ``more`` to the rows: none, one tensor [T, D] or the sum of two; then what the layer's attention makes of
        them.

        Returns the rows [T, D] normed for the layer's MLP, which the next call overwrites. Raises IndexError for a
        position or slot that does not exist, ValueError for ``more`` of another shape or dtype.
        """
        if any(part.shape != self.x.shape or part.dtype != self.x.dtype for part in more):
            told = [(part.dtype, list(part.shape)) for part in more]
            raise ValueError(f"to be added are {told}, the rows are {self.x.dtype} {list(self.x.shape)}")
        called, parts = self._layers[layer], [part.contiguous() for part in more]
        first, second = [*[part.data_ptr() for part in parts], None, None][:2]
        outside = getattr(self._kernels, called.kind)(
            self._kernels.number,
            KINDS[self.x.dtype],
            ctypes.addressof(called.fields),
            ctypes.addressof(self._step),
            first,
            second,
            torch.get_num_threads(),
        )
        if outside:
            positions, slots = self._held[:2]
            row = outside - 1
            raise IndexError(f"row {row} has position {int(positions[row])} and slot {int(slots[row])}, one too far")
        return self._normed
