"""Reused memory for results on their way, so that a layer allocates nothing in the steady state."""

from __future__ import annotations

import torch
from torch import Tensor


class ScratchPool:
    """Hands out [rows, columns] tensors over flat buffers that it keeps. One thread uses it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}  # by address

    def take(self, rows: int, columns: int) -> Tensor:
        """Uninitialised [rows, columns]; give it back with ``give``."""
        need = rows * columns
        fitting = [at for at, flat in enumerate(self._free) if flat.numel() >= need]
        if fitting:
            flat = self._free.pop(fitting[0])
        else:
            if self._free:
                self._free.pop()  # too small for today's batches: replaced by a larger one
            flat = torch.empty(max(need, 1), dtype=self._dtype, device=self._device)
        self._lent[flat.data_ptr()] = flat
        return flat[:need].view(rows, columns)

    def give(self, tensor: Tensor) -> None:
        """Take back what ``take`` returned; the caller must not use it any more. KeyError for anything else."""
        self._free.append(self._lent.pop(tensor.untyped_storage().data_ptr()))  # a tensor without rows has no address
