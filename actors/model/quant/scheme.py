"""What a config.json's ``quantization_config`` says about the weights on disk. Frozen data, without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

QuantMethod = Literal["fp8", "compressed-tensors", "gptq", "awq"]
Bits = Literal[4, 8]

NOT_QUANTISED = "-:"


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Which matrices are quantised is told by the tensors themselves (a scale beside them), not here.

    ``group_size``: columns that share a scale; 0: all of a row. ``block``: rows and columns of an fp8 block.
    ``floating``: compressed-tensors' numbers are fp8 (e4m3), not integers; ``one_scale``: for a whole matrix.
    ``ordered``: beside each matrix there must be the group of each of its columns (GPTQ's act order).
    ``int8_activations``: rows are quantised to int8 as they come, each with its own scale (W8A8 dynamic).
    ``zero_offset``: what is added to a stored zero point (1 for the first GPTQ format, else 0). ``dynamic``:
    GPTQModel's rules for single matrices, see :meth:`own_setting`.
    """

    method: QuantMethod
    bits: Bits
    group_size: int = 0
    symmetric: bool = True
    block: tuple[int, int] = (128, 128)
    floating: bool = False
    one_scale: bool = False
    ordered: bool = False
    int8_activations: bool = False
    zero_offset: int = 0
    dynamic: tuple[str, ...] = ()

    def own_setting(self, base: str) -> str | None:
        """The rule that gives the matrix ``base`` (its name without ``.weight``) a setting of its own; None if it has
        that of all. The first rule that matches counts; those with ``-:`` leave a matrix as it is (GPTQModel's
        ``dynamic_get``)."""
        for rule in self.dynamic:
            if re.match(rule.removeprefix(NOT_QUANTISED).removeprefix("+:"), base):
                return None if rule.startswith(NOT_QUANTISED) else rule
        return None
