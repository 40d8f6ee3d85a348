"""The compiled kernels of the package, where they were built, and which of them this CPU runs."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

ISA_VARIABLE = "EXPERTMESH_ISA"
"""Environment: an instruction set to use instead of the best, or ``none`` to compute with torch alone."""

NONE = "none"

_NO_MEMORY = -2
"""What the functions return instead of throwing."""

log = logging.getLogger(__name__)


class Library:
    """The C functions of ``src/kernels.cpp``, for one instruction set. Calls leave the GIL; MemoryError where they find
    none."""

    def __init__(self, functions: ctypes.CDLL, isa: str) -> None:
        """Raises ValueError for an instruction set that this CPU or this build does not have."""
        known = instruction_sets(functions)
        if isa not in known:
            raise ValueError(f"{ISA_VARIABLE}: {isa!r}; here it may be {', '.join(known)} or {NONE}")
        self.isa = isa
        self.number = known.index(isa)
        self.linear = functions.expertmesh_linear
        self.dequantize = functions.expertmesh_dequantize
        self.experts = functions.expertmesh_experts
        self.attention = functions.expertmesh_attention
        self.head_products = functions.expertmesh_head_products
        self.combine = functions.expertmesh_combine
        self.dispatch = functions.expertmesh_dispatch
        self.grouped_layer = functions.expertmesh_grouped_layer
        self.latent_layer = functions.expertmesh_latent_layer
        self.gate = functions.expertmesh_gate
        self.quantize_int4 = functions.expertmesh_quantize_int4


def instruction_sets(functions: ctypes.CDLL) -> list[str]:
    """Those of this CPU that the kernels were compiled for, the best first."""
    names: list[str] = []
    while name := functions.expertmesh_isa(len(names)):
        names.append(name.decode())
    return names


@cache
def functions() -> ctypes.CDLL | None:
    """The shared library; None, and said once, where the package was installed without g++."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            return _declared(ctypes.CDLL(str(path)))
    log.warning("the CPU kernels are not built (no g++ when the package was installed?): computing with torch, slower")
    return None


@cache
def library() -> Library | None:
    """What is used in this process; None: torch alone. Raises ValueError for a wrong EXPERTMESH_ISA."""
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted == NONE:
        return None
    found = functions()
    if found is None:
        if wanted:
            raise ValueError(f"{ISA_VARIABLE}: {wanted!r}; the CPU kernels are not built, so it may be {NONE} alone")
        return None
    return Library(found, wanted or instruction_sets(found)[0])


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.expertmesh_isa.argtypes, found.expertmesh_isa.restype = [number], ctypes.c_char_p
    arguments: dict[str, list[type[Any]]] = {
        "linear": [*[number] * 3, *[pointer] * 4, *[whole] * 4, number],
        "dequantize": [*[number] * 3, *[pointer] * 2, *[whole] * 2, number],
        "experts": [*[number] * 4, *[pointer] * 5, *[whole] * 5, number],
        "attention": [number, number, *[pointer] * 7, *[whole] * 8, ctypes.c_float, number],
        "head_products": [number, number, *[pointer] * 3, *[whole] * 8, number],
        "combine": [*[number] * 4, *[pointer] * 3, *[whole] * 4, number],
        "dispatch": [*[pointer] * 5, *[whole] * 5],
        "grouped_layer": [number, number, *[pointer] * 4, number],
        "latent_layer": [number, number, *[pointer] * 4, number],
        "gate": [number, number, *[pointer] * 4, whole, number],
        "quantize_int4": [number, number, *[pointer] * 4, *[whole] * 3, number],
    }
    for name, types in arguments.items():
        function = getattr(found, f"expertmesh_{name}")
        function.argtypes, function.restype, function.errcheck = types, whole, _checked
    return found


def _checked(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result == _NO_MEMORY:
        raise MemoryError(f"{function.__name__}: no memory for the rows of this call")
    return result
