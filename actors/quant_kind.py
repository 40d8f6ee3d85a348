"""As what a quantised matrix is kept in memory: the one list of it, for configuration, actors and model alike."""

from __future__ import annotations

from typing import Literal, get_args

QuantKind = Literal["int8", "int4", "fp8"]

QUANT_KINDS: tuple[QuantKind, ...] = get_args(QuantKind)
