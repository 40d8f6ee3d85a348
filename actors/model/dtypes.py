"""Dtypes by their names in torch, for whoever describes tensors and does without torch: loading that takes a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .safetensors_header import ITEM_BITS

if TYPE_CHECKING:
    import torch

STORED = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
"""By the safetensors format's names; those that torch has not are left out."""

ITEM_BYTES = {name: ITEM_BITS[stored] // 8 for stored, name in STORED.items()}

COMPUTED = ("float32", "bfloat16", "float16")
"""In which models are computed, plain weights are stored, and scales are kept."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def shown(names: tuple[str, ...]) -> str:
    """As errors tell them: ``torch.float32, torch.bfloat16``."""
    return ", ".join(f"torch.{name}" for name in names)
