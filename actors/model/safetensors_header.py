"""The header of a .safetensors file, checked against the file's size without reading tensor data.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data the JSON's offsets point
into (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's reference implementation."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip


def check_header(path: Path) -> frozenset[str]:
    """Names of the tensors in ``path``. CheckpointError if the file is absent, truncated or inconsistent."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though the checkpoint needs it")
    size = path.stat().st_size
    header, header_bytes = _read_header(path, size)
    header.pop("__metadata__", None)
    expected = header_bytes + max((_tensor_end(path, name, entry) for name, entry in header.items()), default=0)
    if size != expected:
        kind = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(f"{path}: is {kind}: {size} bytes, expected {expected}")
    return frozenset(header)


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header and where it ends, in bytes from the file's start."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: is truncated or no safetensors file: {size} bytes, header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is {type(header).__name__}, expected a JSON object")
    return header, 8 + length


def _tensor_end(path: Path, name: str, entry: Any) -> int:
    """Where the tensor's data end, in bytes from the data's start."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    shape, offsets = _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    item = ITEM_BYTES.get(str(fields.get("dtype")))
    if item is None or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{path}: header entry of tensor {name!r} is malformed: {entry!r}")
    begin, end = offsets
    expected = math.prod(shape) * item
    if end - begin != expected:
        raise CheckpointError(f"{path}: tensor {name!r} spans {begin}..{end}, expected {expected} bytes")
    return end


def _counts(value: Any) -> list[int] | None:
    """``value`` if it is a list of integers >= 0."""
    whole = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return value if whole else None
