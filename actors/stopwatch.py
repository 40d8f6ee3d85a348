"""How long a device computes, without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Measured(NamedTuple):
    """So many blocks took so many seconds together."""

    seconds: float = 0.0
    blocks: int = 0


class Stopwatch:
    """Adds up the time spent inside ``running`` blocks, and counts them. One thread measures, any may read
    ``measured``: a new one after each block, so that its two figures belong together.

    On a GPU the time is that between two events on the current stream, and counts, as the block does, once a later
    block begins: the host runs ahead of the device, and waiting for it would hold up the next batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.measured = Measured()
        self.last_s = 0.0
        self._on_gpu = device.type == "cuda"
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is computed inside. A block that raises does not count."""
        if self._on_gpu:
            self._collect()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._open.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._add(time.perf_counter() - started)

    def _collect(self) -> None:
        while self._open and self._open[0][1].query():
            begin, end = self._open.popleft()
            self._add(begin.elapsed_time(end) / 1000.0)

    def _add(self, seconds: float) -> None:
        self.last_s = seconds
        self.measured = Measured(self.measured.seconds + seconds, self.measured.blocks + 1)
