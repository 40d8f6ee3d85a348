"""A process's tensors, in the dtype and on the device where it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .weights import Checkpoint


class TensorReader:
    """Reads a process's tensors in the dtype and on the device where it computes, and reports progress.

    ``progress`` gets the bytes read from disk, once per tensor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self.dtype = dtype
        self._device = device
        self._progress = progress

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``name``, which must have ``shape``."""
        before = self._checkpoint.bytes_read
        tensor = self._checkpoint.read(name, shape, self.dtype).to(self._device)
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read - before)
        return tensor

    def stacked(self, parts: Iterable[tuple[str, tuple[int, ...]]]) -> Tensor:
        """The tensors (name, shape) under one another, along axis 0: one product instead of several."""
        wanted = list(parts)
        rows = sum(shape[0] for _, shape in wanted)
        out = torch.empty((rows, *wanted[0][1][1:]), dtype=self.dtype, device=self._device)
        start = 0
        for name, shape in wanted:
            out[start : start + shape[0]] = self(name, shape)
            start += shape[0]
        return out
