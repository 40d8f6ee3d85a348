"""Reused memory for results on their way, so that a layer allocates nothing in the steady state."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class ScratchPool:
    """Hands out [rows, columns] tensors over flat buffers that it keeps. One thread uses it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._free: list[Tensor] = []

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
        return flat[:need].view(rows, columns)

    def give(self, tensor: Tensor) -> None:
        """Take back what ``take`` returned; the caller must not use it any more."""
        whole = tensor.untyped_storage()
        self._free.append(torch.empty(0, dtype=self._dtype, device=self._device).set_(whole))


def place_rows(into: Tensor, at: NDArray[np.int64], rows: Tensor) -> None:
    """``into`` [N, D] at the indices ``at`` int64[P] becomes ``rows`` [P, D] of its dtype and device; both contiguous.

    In host memory by numpy, which copies row by row: torch goes element by element, six times as slow for 48 rows of
    4 KiB.
    """
    if into.is_cpu:
        into.view(torch.uint8).numpy()[at] = rows.view(torch.uint8).numpy()
    else:
        into[torch.from_numpy(at).to(into.device)] = rows
