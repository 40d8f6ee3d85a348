"""Paged storage of what attention keeps of past tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .spec import MoEDecoderSpec


class KVCache:
    """``n_blocks`` blocks of ``block_size`` slots in every layer; which block is whose is not known here.

    A slot (block * block_size + offset) holds one token's two *planes*: k and v for GQA, each [kv_heads,
    head_dim]; the normed latent [r] and the rotated key [dr] for MLA.
    """

    def __init__(
        self,
        spec: MoEDecoderSpec,
        n_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if n_blocks < 1 or block_size < 1:
            raise ValueError(f"n_blocks is {n_blocks}, block_size is {block_size}: both must be 1 or more")
        self.n_blocks = n_blocks
        self.block_size = block_size
        first, second = spec.attn.kv_planes
        slots = n_blocks * block_size
        self._first = _zeros((spec.n_layers, slots, *first), dtype, torch.device(device))
        self._second = _zeros((spec.n_layers, slots, *second), dtype, torch.device(device))

    @classmethod
    def bytes_per_token(cls, spec: MoEDecoderSpec, dtype: torch.dtype) -> int:
        """Bytes that one token takes over all layers."""
        return spec.kv_floats_per_token * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return self._first.nbytes + self._second.nbytes

    def write(self, layer: int, slots: Tensor, first: Tensor, second: Tensor) -> None:
        """Keep the planes of T tokens: first and second are [T, ...], slots int64 [T]."""
        self._first[layer].index_copy_(0, slots, first)
        self._second[layer].index_copy_(0, slots, second)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of both planes, [*slots.shape, ...], for int64 slots of any shape."""
        shape = slots.shape
        first = self._first[layer].index_select(0, slots.flatten())
        second = self._second[layer].index_select(0, slots.flatten())
        return first.unflatten(0, shape), second.unflatten(0, shape)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros; on the CPU the memory comes from calloc and takes up room only when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
