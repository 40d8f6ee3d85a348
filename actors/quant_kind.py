"""How matrices are quantised: the one list of it, for configuration, actors and model alike."""

from __future__ import annotations

from typing import Literal, get_args

NumberKind = Literal["int8", "int4", "fp8"]
"""As what a quantised matrix's numbers are kept in memory."""

NUMBER_KINDS: tuple[NumberKind, ...] = get_args(NumberKind)

QuantKind = Literal["int8", "int4", "fp8", "w8a8", "w4a8"]
"""What can be asked for: numbers of a kind for rows that stay as they are (weight-only), or ``w8a8`` and ``w4a8``: int8
and int4 for rows that are quantised to int8 themselves as they come."""

QUANT_KINDS: tuple[QuantKind, ...] = get_args(QuantKind)

NUMBERS: dict[QuantKind, NumberKind] = {"int8": "int8", "int4": "int4", "fp8": "fp8", "w8a8": "int8", "w4a8": "int4"}
"""What each keeps."""
