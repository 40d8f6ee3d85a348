"""A file's bytes as memory: used where they lie in the system's cache, without a copy of them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

import torch
from torch import Tensor

LEAST_BYTES = 64 * 1024
"""Smaller tensors are not worth system calls and page table entries of their own."""

_LOCAL = {
    0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0xF2F52010: "f2fs", 0x01021994: "tmpfs",
    0x794C7630: "overlayfs",
}  # fmt: skip
"""By the numbers of statfs(2). Over a network a page that was given back is slow to come again, or does not."""

_MAP_NORESERVE = 0x4000  # not yet in the module mmap of Python 3.11
_MADV_WILLNEED, _MADV_DONTNEED, _MADV_POPULATE_READ = 3, 4, 22
_STATFS_BYTES = 256

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]


class MappedFile:
    """A whole file, mapped as long as a tensor of it lives. What is written into such a tensor stays in this process.

    Pages are shared with the system's cache and with other processes, and where the file system keeps large ones they
    are mapped as such (measured on ext4: 2 MiB each). Thread-safe.
    """

    def __init__(self, fd: int, size: int) -> None:
        """fd: open for reading, its own may be closed afterwards. Raises OSError where that cannot be mapped."""
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        self._memory = mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    @classmethod
    def of(cls, fd: int, size: int) -> MappedFile | None:
        """None for a file that is better read: on another than a local file system, or with a kernel that cannot
        bring pages in and tell of errors (Linux before 5.14)."""
        if not size or not _on_local_disk(fd):
            return None
        try:
            mapped = cls(fd, size)
            mapped.bring_in(mapped.bytes(0, 1))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENODEV, errno.ENOMEM):
                return None
            raise
        return mapped

    def bytes(self, begin: int, end: int) -> Tensor:
        """uint8 [end - begin]: these bytes of the file. When they are dropped the system may have the pages again."""
        return piece(self._memory, begin, end)

    def bring_in(self, part: Tensor) -> None:
        """Have ``part``, which ``bytes`` gave, in memory: read ahead, then mapped. OSError if it cannot be read:
        touched without this, that would end the process."""
        start = part.data_ptr() & -mmap.PAGESIZE
        length = part.data_ptr() + part.nbytes - start
        for advice in (_MADV_WILLNEED, _MADV_POPULATE_READ):
            if _libc.madvise(start, length, advice):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))


def piece(memory: mmap.mmap, begin: int, end: int) -> Tensor:
    """uint8 [end - begin]: these bytes of a private mapping, whose pages the system has again when they are dropped."""
    array = (ctypes.c_ubyte * (end - begin)).from_buffer(memory, begin)
    weakref.finalize(array, _let_go, memory, begin, end).atexit = False
    return torch.frombuffer(array, dtype=torch.uint8)


def _let_go(memory: mmap.mmap, begin: int, end: int) -> None:
    """Unmap the pages that are of [begin, end) alone: those at its borders belong to neighbours too."""
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        memory.madvise(_MADV_DONTNEED, first, last - first)


def _on_local_disk(fd: int) -> bool:
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, answer):
        return False
    return ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF in _LOCAL
