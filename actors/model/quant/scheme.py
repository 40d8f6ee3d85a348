"""What a config.json's ``quantization_config`` says about the weights on disk. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QuantMethod = Literal["fp8", "compressed-tensors", "gptq", "awq"]
Bits = Literal[4, 8]


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Which matrices are quantised is told by the tensors themselves (a scale beside them), not here.

    ``group_size``: columns that share a scale; 0: all of a row. ``block``: rows and columns of an fp8 block.
    ``int8_activations``: rows are quantised to int8 as they come, each with its own scale (W8A8 dynamic).
    ``zero_offset``: what is added to a stored zero point (1 for the first GPTQ format, else 0).
    """

    method: QuantMethod
    bits: Bits
    group_size: int = 0
    symmetric: bool = True
    block: tuple[int, int] = (128, 128)
    int8_activations: bool = False
    zero_offset: int = 0
