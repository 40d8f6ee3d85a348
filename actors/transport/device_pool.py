"""Device memory for payload on its way, reused so that the steady state allocates none."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_BYTES = 4096


class DevicePool:
    """Hands out uint8 tensors over buffers that it keeps, in powers of two. One thread uses it.

    It never shrinks: what it holds is bounded by what was on its way at the same time, and goes with its group.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[Tensor]] = {}
        self.allocations = 0

    def take(self, size: int) -> Tensor:
        """Uninitialised uint8 [size]; give it back with ``give``."""
        room = max(_LEAST_BYTES, 1 << (size - 1).bit_length()) if size else _LEAST_BYTES
        free = self._free.setdefault(room, [])
        if free:
            return free.pop()[:size]
        self.allocations += 1
        # Never inference tensors, which nobody could write into outside of that mode.
        with torch.inference_mode(False):
            return torch.empty(room, dtype=torch.uint8, device=self._device)[:size]

    def give(self, tensor: Tensor) -> None:
        """Take back what ``take`` returned. Work on it that this thread has enqueued may still be under way."""
        with torch.inference_mode(False):
            whole = torch.empty(0, dtype=torch.uint8, device=self._device).set_(tensor.untyped_storage())
        self._free.setdefault(whole.numel(), []).append(whole)
