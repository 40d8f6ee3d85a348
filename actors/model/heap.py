"""Memory for what is loaded, in large pages, such that what loading has freed goes back to the system."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import threading

import torch
from torch import Tensor

from .mapped_file import piece

MAPPED_BYTES = 1024 * 1024
"""From here on a tensor has a mapping of its own."""

LEAST_BYTES = 64 * 1024
"""From here on what stays is no part of the heap."""

CHUNK_BYTES = 64 * 1024 * 1024
"""Mapped at a time: the system's large pages (2 MiB) do not fit experts' matrices one by one. Weights in small pages
are read at 28 to 36 GB/s, in large ones at 40 (measured, two threads)."""

EVERY_BYTES = 64 * 1024 * 1024
"""Loaded between two trims. One takes 4 to 30 ms of quantised experts (measured; 140 ms on a heap of 400 MB in small
holes), and whoever allocates meanwhile may have to wait; without any, the peak was 240 MB over 409 MB of weights."""


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU; a large one is no part of the heap, so that nothing is left when it is dropped."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def lasting(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """:func:`blank` for weights, which come to stay, in large pages where the system has them. What is soon dropped
    would break the pages of its neighbours up."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    return _chunks.take(nbytes).view(dtype).view(shape)


class _Chunks:
    """Hands out one chunk after the other, from the beginning to the end, in whole pages. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes]: pages that nobody else has. When it is dropped the system has them again."""
        with self._lock:
            if self._memory is None or self._used + nbytes > len(self._memory):
                self._memory, self._used = _mapped(max(nbytes, CHUNK_BYTES)), 0
            memory, begin = self._memory, self._used
            self._used += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            end = self._used
        return piece(memory, begin, min(end, len(memory)))[:nbytes]


def _mapped(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel without large pages
            raise
    return memory


_chunks = _Chunks()


def trim() -> None:
    """Give free pages of the C library's heap back to the system.

    Tensors of some megabytes that are made and dropped between others that stay, in several threads, each with a heap
    of its own, leave holes that glibc neither fills nor gives back. Measured: 100 MB of experts, quantised as they were
    read, left a process 150 MB larger than they are; trimmed, up to 25 MB. Other C libraries have no such call and are
    left alone.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


class HeapTrimmer:
    """Trims as loading goes on. Used by all threads of a load, which trims once more when it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = 0

    def loaded(self, nbytes: int) -> None:
        """``nbytes`` more have come to stay. Trims when it is time."""
        with self._lock:
            self._since += nbytes
            due = self._since >= EVERY_BYTES
            if due:
                self._since = 0
        if due:
            trim()


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
