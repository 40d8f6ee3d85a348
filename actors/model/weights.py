"""A safetensors checkpoint: which tensors it has, and single ones of them."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .errors import CheckpointError
from .heap import blank
from .safetensors_header import Stamp
from .tensor_file import TensorFile
from .weight_files import listing_stamps, read_headers

READABLE = (torch.float32, torch.bfloat16, torch.float16)


class Checkpoint:
    """A folder's .safetensors files (which: see :func:`read_headers`). Reading is safe from several threads.

    Opening checks every file's presence and header, so that a missing or truncated file is found at once. That keeps
    the interpreter busy (measured: 1.9 s for 89,088 tensors), so who reads again later keeps this, closed, and asks
    whether it is ``unchanged``. Tensor data are read by the ``read`` methods alone, straight into the tensors that they
    return: CPU, contiguous. With ``map_files`` large ones that need no cast are not copied from local disks but used
    where they lie (:class:`MappedFile`), aligned to their elements; all others are aligned and in memory of their own.
    ``bytes_read`` counts bytes of tensors as they lie on disk. With ``check_finite``, NaN and infinity are refused. All
    errors are CheckpointError and name the file, the tensor if there is one, and what was expected.
    """

    def __init__(self, path: str | Path, check_finite: bool = True, map_files: bool = False) -> None:
        self._folder = Path(path)
        self.check_finite = check_finite
        self._listing = listing_stamps(self._folder)
        self._files = []
        self._file_of: dict[str, TensorFile] = {}
        for file_path, header in read_headers(self._folder).items():
            file = TensorFile(file_path, header, map_files)
            self._files.append(file)
            self._file_of.update(dict.fromkeys(header.entries, file))
        self._counting = threading.Lock()
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Of all tensors read so far."""
        return self._bytes_read

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def has(self, name: str) -> bool:
        """Whether there is a tensor called ``name``."""
        return name in self._file_of

    def file(self, name: str) -> Path:
        """Where ``name`` lies. CheckpointError if it is absent."""
        return self._file(name).path

    def dtype(self, name: str) -> torch.dtype:
        """In which ``name`` is stored. CheckpointError if it is absent or of a type that torch has not."""
        return self._file(name).dtype(name)

    def stored(self, name: str) -> str:
        """The name of its dtype."""
        return str(self.dtype(name)).removeprefix("torch.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of ``name`` as stored. CheckpointError if it is absent."""
        return self._file(name).shape(name)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, cast to ``dtype`` (fp32, bf16 or fp16) unless None.

        Refuses a tensor that is absent, has another shape, or is of a type other than fp32, bf16 and fp16. The finite
        check is after the cast: what fp16 cannot hold would overflow.
        """
        stored = self._stored(name, shape, READABLE)
        return self._get(name, shape, dtype or stored)

    def has_view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether :meth:`read` of ``name`` gives it where it lies in its file."""
        return self._file(name).has_view(name, math.prod(shape), dtype)

    def read_into(self, out: Tensor, name: str) -> None:
        """:meth:`read` of the shape and dtype of ``out``, which is CPU and contiguous: part of a larger one, say."""
        self._stored(name, tuple(out.shape), READABLE)
        self._fill(out, name)

    def read_entry(
        self, name: str, count: int, index: int, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        """Entry ``index`` of a tensor [count, *shape], as :meth:`read` would; no byte of the others is read.

        IndexError unless 0 <= index < count.
        """
        if not 0 <= index < count:
            raise IndexError(f"entry {index} of tensor {name!r}, expected 0..{count - 1}")
        stored = self._stored(name, (count, *shape), READABLE)
        return self._get(name, shape, dtype or stored, skip=index * math.prod(shape))

    def read_raw(self, name: str, shape: tuple[int, ...], allowed: tuple[torch.dtype, ...]) -> Tensor:
        """The tensor as it is stored, in one of the ``allowed`` dtypes: packed or quantised weights, scales.

        The finite check is of floating ones, fp8 too: its NaN are 0x7f and 0xff.
        """
        stored = self._stored(name, shape, allowed)
        return self._get(name, shape, stored)

    def unchanged(self) -> bool:
        """Whether the folder holds what it held when this was made, as far as the system tells: no file of it was
        written, replaced, added or taken away."""
        listed = all(Stamp.of(path) == stamp for path, stamp in self._listing.items())
        return listed and all(file.unchanged() for file in self._files)

    def close(self) -> None:
        """Let go of the files. May be called again; a later read opens them anew."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, name: str, expected: str = "") -> TensorFile:
        if name not in self._file_of:
            raise CheckpointError(f"{self._folder}: has no tensor {name!r}{expected}")
        return self._file_of[name]

    def _stored(self, name: str, shape: tuple[int, ...], allowed: tuple[torch.dtype, ...]) -> torch.dtype:
        """The dtype that ``name`` is stored in, which must be ``allowed``; its shape must be ``shape``."""
        file = self._file(name, f" (expected shape {list(shape)})")
        if file.shape(name) != shape:
            got = list(file.shape(name))
            raise CheckpointError(f"{file.path}: tensor {name!r} has shape {got}, expected {list(shape)}")
        stored = file.dtype(name)
        if stored not in allowed:
            wanted = ", ".join(map(str, allowed))
            raise CheckpointError(f"{file.path}: tensor {name!r} is {stored}, expected one of {wanted}")
        return stored

    def _get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, skip: int = 0) -> Tensor:
        """Elements of ``name`` from number ``skip`` on."""
        file, numel = self._file_of[name], math.prod(shape)
        if not file.has_view(name, numel, dtype, skip):
            return self._fill(blank(shape, dtype), name, skip)
        view = file.view(name, numel, skip, self.check_finite)
        self._count(view.nbytes)
        return view.view(shape)

    def _fill(self, out: Tensor, name: str, skip: int = 0) -> Tensor:
        """``out``, filled with elements of ``name`` from number ``skip`` on."""
        file = self._file_of[name]
        file.read_into(out, name, skip, self.check_finite)
        self._count(out.numel() * file.dtype(name).itemsize)
        return out

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self._bytes_read += nbytes


__all__ = ["Checkpoint", "CheckpointError"]
