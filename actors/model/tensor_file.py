"""One .safetensors file, of which single tensors are read by position."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .dtypes import STORED, torch_dtype
from .errors import CheckpointError
from .finite import all_finite
from .mapped_file import LEAST_BYTES, MappedFile
from .safetensors_header import Header, Stamp

PIECE = 1024 * 1024
"""Bytes read at a time: what is still in a core's cache when it is cast and checked."""

DTYPES = {stored: torch_dtype(name) for stored, name in STORED.items()}


class TensorFile:
    """A file and what its header says. Opened at the first read; may be read by several threads at once.

    ``read_into`` copies bytes to where they stay: what a process holds is what it asked for, and a file that is cut off
    under it is an error, not a SIGBUS. ``view`` gives them where they lie, if the file ``may_be_mapped`` and is on a
    local disk. A file that is not the one any more whose header was read is refused when it is opened. All errors are
    CheckpointError.
    """

    def __init__(self, path: Path, header: Header, may_be_mapped: bool = False) -> None:
        self.path = path
        self._may_be_mapped = may_be_mapped
        self._mapped: MappedFile | None = None
        self._entries = header.entries
        self._stamp = header.stamp
        self._lock = threading.Lock()
        self._fd: int | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor ``name``, which is in this file."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """In which it is stored."""
        stored = self._entries[name].dtype
        if stored not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name!r} is {stored}, expected one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read_into(self, out: Tensor, name: str, skip: int = 0, check_finite: bool = True) -> None:
        """Fill ``out`` (CPU, contiguous) with elements of ``name`` from number ``skip`` on, cast to out's dtype.

        With ``check_finite``, NaN and infinity are refused after the cast: what fp16 cannot hold would overflow.
        """
        begin = self._begin(name, skip)
        flat = out.view(-1)
        pieces = self._pieces if flat.dtype == self.dtype(name) else self._cast_pieces
        for piece in pieces(flat, name, begin):
            if check_finite:
                self._refuse_unless_finite(piece, name)

    def has_view(self, name: str, numel: int, dtype: torch.dtype, skip: int = 0) -> bool:
        """Whether :meth:`view` gives ``numel`` elements of ``name`` from number ``skip`` on."""
        begin, nbytes = self._begin(name, skip), numel * dtype.itemsize
        if not self._may_be_mapped or self.dtype(name) != dtype or nbytes < LEAST_BYTES or begin % dtype.itemsize:
            return False
        self._opened(name)
        return self._mapped is not None

    def view(self, name: str, numel: int, skip: int = 0, check_finite: bool = True) -> Tensor:
        """[numel] as it is stored, in the file's own pages, which are in memory then. ``has_view`` says whether."""
        mapped, dtype, begin = self._mapped, self.dtype(name), self._begin(name, skip)
        assert mapped is not None
        flat = mapped.bytes(begin, begin + numel * dtype.itemsize)
        try:
            mapped.bring_in(flat)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
        flat = flat.view(dtype)
        if check_finite:
            for piece in flat.split(PIECE // flat.itemsize):
                self._refuse_unless_finite(piece, name)
        return flat

    def unchanged(self) -> bool:
        """Whether the file is still the one whose header was read."""
        return Stamp.of(self.path) == self._stamp

    def close(self) -> None:
        """Let go of the file. May be called again, but not while it is read."""
        with self._lock:
            fd, self._fd, self._mapped = self._fd, None, None
        if fd is not None:
            os.close(fd)

    def _begin(self, name: str, skip: int) -> int:
        return self._entries[name].begin + skip * self.dtype(name).itemsize

    def _refuse_unless_finite(self, piece: Tensor, name: str) -> None:
        if not all_finite(piece):
            raise CheckpointError(f"{self.path}: tensor {name!r} holds NaN or infinity, expected finite {piece.dtype}")

    def _pieces(self, flat: Tensor, name: str, begin: int) -> Iterator[Tensor]:
        """Fill ``flat`` from byte ``begin`` on, piece after piece; yields each when it is filled."""
        for piece in flat.split(PIECE // flat.itemsize):
            self._fill(piece, name, begin)
            begin += piece.nbytes
            yield piece

    def _cast_pieces(self, flat: Tensor, name: str, begin: int) -> Iterator[Tensor]:
        """The same from a file of another dtype."""
        stored = self.dtype(name)
        staged = _staging().view(stored)
        for piece in flat.split(len(staged)):
            raw = staged[: len(piece)]
            self._fill(raw, name, begin)
            begin += raw.nbytes
            yield piece.copy_(raw)

    def _fill(self, piece: Tensor, name: str, begin: int) -> None:
        """Read ``piece`` from byte ``begin`` on: one system call, unless the file system gives less than asked."""
        rest = memoryview(piece.view(torch.uint8).numpy().data)
        while rest:
            try:
                got = os.preadv(self._opened(name), [rest], begin)
            except OSError as error:
                raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
            if got == 0:
                raise CheckpointError(
                    f"{self.path}: was cut off while it was read: ends at byte {begin}, inside tensor {name!r}, "
                    f"expected {len(rest)} more"
                )
            rest, begin = rest[got:], begin + got

    def _opened(self, name: str) -> int:
        with self._lock:
            if self._fd is None:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                if Stamp.of(fd) != self._stamp:
                    os.close(fd)
                    raise CheckpointError(
                        f"{self.path}: was replaced or written to after its header was read, and before tensor "
                        f"{name!r} was: expected the file to stay as it is"
                    )
                if self._may_be_mapped:
                    self._mapped = MappedFile.of(fd, os.fstat(fd).st_size)
                self._fd = fd
            return self._fd


_of_thread = threading.local()


def _staging() -> Tensor:
    """PIECE bytes for this thread to cast from.

    Kept as long as the thread lives: made anew for every tensor, it would leave a hole in the heap between them that
    none of them fits (measured: 20 % of what was loaded).
    """
    if not hasattr(_of_thread, "staging"):
        _of_thread.staging = torch.empty(PIECE, dtype=torch.uint8)
    staging: Tensor = _of_thread.staging
    return staging
