"""Where the compiled express finds the kernels."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from actors.native.library import Library, library
from actors.native.matrix import KINDS
from actors.settings import ModelSettings

try:
    from actors.express import _express
except ImportError:
    _express = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


def compiled(model: ModelSettings) -> tuple[ModuleType, Library] | None:
    """The compiled express and the kernels that it calls; None where this model's rows are not theirs."""
    kernels = library()
    if kernels is None or model.device != "cpu" or model.nccl or model.torch_dtype not in KINDS:
        return None
    if _express is None:
        log.warning("express is not built (no g++ when the package was installed?): frames take longer")
        return None
    return _express, kernels


def call_of(kernels: Library, model: ModelSettings) -> tuple[int, int, int]:
    """By which numbers kernels are called: the instruction set, the rows' type and threads."""
    return kernels.number, KINDS[model.torch_dtype], model.thread_count


def address(function: Callable[..., Any]) -> int:
    """Of a function of the kernels."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
