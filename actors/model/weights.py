"""A safetensors checkpoint: which tensors it has, and single ones of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError
from .safetensors_header import check_header

READABLE = (torch.float32, torch.bfloat16, torch.float16)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """A folder with ``model.safetensors``, or ``model.safetensors.index.json`` and the files it names.

    Opening checks every file's presence and header, so that a missing or truncated file is found at once;
    tensor data are read by :meth:`read` alone. ``bytes_read`` counts bytes of tensors as they lie on disk.
    All errors are CheckpointError and name the file, the tensor if there is one, and what was expected.
    """

    def __init__(self, path: str | Path, check_finite: bool = True) -> None:
        self._folder = Path(path)
        self._check_finite = check_finite
        self._file_of = _locate(self._folder)
        self._open: dict[Path, Any] = {}
        self.bytes_read = 0

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def has(self, name: str) -> bool:
        """Whether there is a tensor called ``name``."""
        return name in self._file_of

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own (CPU, contiguous, aligned), cast to ``dtype`` unless None.

        Refuses a tensor that is absent, has another shape, is of a type other than fp32, bf16 and fp16, or,
        with ``check_finite``, holds NaN or infinity (after the cast: what fp16 cannot hold would overflow).
        """
        if name not in self._file_of:
            raise CheckpointError(f"{self._folder}: has no tensor {name!r} (expected shape {list(shape)})")
        file = self._file_of[name]
        stored = self._handle(file).get_tensor(name)
        if tuple(stored.shape) != shape:
            got = list(stored.shape)
            raise CheckpointError(f"{file}: tensor {name!r} has shape {got}, expected {list(shape)}")
        if stored.dtype not in READABLE:
            allowed = ", ".join(map(str, READABLE))
            raise CheckpointError(f"{file}: tensor {name!r} is {stored.dtype}, expected one of {allowed}")
        self.bytes_read += stored.nbytes
        tensor = torch.empty(shape, dtype=dtype or stored.dtype).copy_(stored)
        if self._check_finite and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: tensor {name!r} holds NaN or infinity, expected finite {tensor.dtype}")
        return tensor

    def close(self) -> None:
        """Let go of the files. May be called again."""
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu").__enter__()
            except SafetensorError as error:
                raise CheckpointError(f"{file}: cannot be opened as safetensors: {error}") from error
        return self._open[file]


def _locate(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, every file checked."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / INDEX).is_file():
        return _locate_indexed(folder)
    if (folder / SINGLE).is_file():
        return dict.fromkeys(check_header(folder / SINGLE), folder / SINGLE)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(f"{folder}: has only pickled weights ({pickles[0]}), expected safetensors: convert them")
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _locate_indexed(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is not a JSON object with a weight_map of name to file: {error!r}") from error
    held: dict[str, frozenset[str]] = {}
    for file in sorted(set(files.values())):
        if not file or Path(file).name != file:
            raise CheckpointError(f"{index}: names the file {file!r}, expected a plain file name in the same folder")
        held[file] = check_header(folder / file)
    for name, file in files.items():
        if name not in held[file]:
            raise CheckpointError(f"{folder / file}: has no tensor {name!r}, though {INDEX} says so")
    return {name: folder / file for name, file in files.items()}


__all__ = ["Checkpoint", "CheckpointError"]
