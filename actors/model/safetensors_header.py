"""The header of a .safetensors file, checked against the file's size without reading tensor data.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data the JSON's offsets point
into; keys are unique, and the tensors fill the data without holes or overlaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's reference implementation."""

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8,
}  # fmt: skip

MAX_DIMENSIONS = 16
MAX_DIMENSION = 2**63 - 1
"""Torch has no larger one. With both limits a shape's product is quickly found, whatever a header says."""

LFS_POINTER = b"version https://git-lfs"


class Stamp(NamedTuple):
    """What tells whether a file, or a folder's listing, is still the one that it was."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp | None:
        """Of a path or a descriptor; None where there is nothing, or nothing that may be looked at."""
        try:
            found = os.stat(file)
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. ``dtype`` is the format's name of it; ``begin``, ``end``: bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file by name, and which file it was that said so."""

    entries: dict[str, TensorEntry]
    stamp: Stamp | None


def read_header(path: Path) -> Header:
    """The tensors in ``path``. CheckpointError if the file is absent, unreadable, truncated or inconsistent."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though the checkpoint needs it")
    header, start, size, stamp = _parse(path)
    entries = {name: _entry(path, name, fields, start) for name, fields in header.items() if name != "__metadata__"}
    expected = max((entry.end for entry in entries.values()), default=start)
    if size != expected:
        kind = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(f"{path}: is {kind}: {size} bytes, expected {expected}")
    _check_gapless(path, entries, start)
    return Header(entries, stamp)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: an object's pairs as a dict. ValueError for a key that is there twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r} is there twice")
    return made


def _parse(path: Path) -> tuple[dict[str, Any], int, int, Stamp | None]:
    """The header, where it ends, and the file's size, both in bytes from the file's start; and the file's stamp."""
    try:
        with path.open("rb") as file:
            stamp = Stamp.of(file.fileno())
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if LFS_POINTER.startswith(start) and size >= 8:
                raise CheckpointError(f"{path}: is a Git LFS pointer, expected the file itself: run git lfs pull")
            if size >= 8 and length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: is no safetensors file: begins with {start!r}, expected the length of a header, at most "
                    f"{MAX_HEADER_BYTES}"
                )
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path}: is truncated or no safetensors file: {size} bytes, header of {length}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is {type(header).__name__}, expected a JSON object")
    return header, 8 + length, size, stamp


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    """One tensor's entry; the data begin ``start`` bytes from the file's start."""
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    shape, offsets, dtype = _counts(fields.get("shape")), _counts(fields.get("data_offsets")), str(fields.get("dtype"))
    bits = ITEM_BITS.get(dtype)
    if bits is None or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{path}: header entry of tensor {name!r} is malformed: {reprlib.repr(value)}")
    if len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_DIMENSION:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {reprlib.repr(shape)}, expected at most {MAX_DIMENSIONS} dimensions "
            f"of at most {MAX_DIMENSION}"
        )
    begin, end = offsets
    expected = math.prod(shape) * bits
    if (end - begin) * 8 != expected:
        raise CheckpointError(f"{path}: tensor {name!r} spans {begin}..{end}, expected {expected / 8:.16g} bytes")
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _check_gapless(path: Path, entries: dict[str, TensorEntry], start: int) -> None:
    """Each tensor begins where the one before it ends. Then none reads another's bytes, and no bytes are hidden."""
    reached = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            kind = "overlaps another" if entry.begin < reached else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {name!r} {kind}: begins at byte {entry.begin - start} of the data, "
                f"expected {reached - start}"
            )
        reached = entry.end


def _counts(value: Any) -> list[int] | None:
    """``value`` if it is a list of integers >= 0."""
    whole = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return value if whole else None
