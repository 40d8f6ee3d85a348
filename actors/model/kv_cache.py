"""Paged storage of what attention keeps of past tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .spec import MoEDecoderSpec


class KVCache:
    """``n_blocks`` blocks of ``block_size`` slots in every layer; which block is whose is not known here.

    A slot (block * block_size + offset) holds one token's *planes* (``spec.attn.kv_planes``): k and v for GQA, each
    [kv_heads, head_dim]; the normed latent [r] and the rotated key [dr] for MLA, then the indexer's key [di] if there
    is one.
    """

    def __init__(
        self,
        spec: MoEDecoderSpec,
        n_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        resident: bool = False,
    ) -> None:
        """``resident``: its memory is taken now; else, on the CPU, as it is first written."""
        if n_blocks < 1 or block_size < 1:
            raise ValueError(f"n_blocks is {n_blocks}, block_size is {block_size}: both must be 1 or more")
        self.n_blocks = n_blocks
        self.block_size = block_size
        slots = n_blocks * block_size
        planes = [
            _zeros((spec.n_layers, slots, *shape), dtype, torch.device(device), resident)
            for shape in spec.attn.kv_planes
        ]
        self._layers = list(zip(*(plane.unbind(0) for plane in planes), strict=True))

    @classmethod
    def bytes_per_token(cls, spec: MoEDecoderSpec, dtype: torch.dtype) -> int:
        """Bytes that one token takes over all layers."""
        return spec.kv_floats_per_token * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return sum(plane.nbytes for planes in self._layers for plane in planes)

    def write(self, layer: int, slots: Tensor, *planes: Tensor) -> None:
        """Keep the planes of T tokens, all of them and in order: each [T, ...], slots int64 [T]."""
        for kept, plane in zip(self._layers[layer], planes, strict=True):
            kept.index_copy_(0, slots, plane)

    def planes(self, layer: int) -> tuple[Tensor, ...]:
        """The planes themselves, each [slots, ...]."""
        return self._layers[layer]

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy the content of blocks (from, to), one after the other, in every layer."""
        size = self.block_size
        for source, target in copies:
            for planes in self._layers:
                for plane in planes:
                    plane[target * size : (target + 1) * size] = plane[source * size : (source + 1) * size]

    def read(self, layer: int, slots: Tensor, planes: Iterable[int] | None = None) -> tuple[Tensor, ...]:
        """Copies of the planes with these numbers (None: of all), [*slots.shape, ...], for int64 slots of any shape."""
        kept = self._layers[layer]
        wanted = kept if planes is None else [kept[i] for i in planes]
        if slots.dim() == 1:  # the usual case in the deterministic mode, once for each segment and layer
            return tuple([plane.index_select(0, slots) for plane in wanted])
        flat = slots.flatten()
        return tuple([plane.index_select(0, flat).unflatten(0, slots.shape) for plane in wanted])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, resident: bool) -> Tensor:
    """As torch.zeros; unless it is to be resident, the CPU's memory comes from calloc and takes up room only when it is
    first written."""
    if resident or device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
