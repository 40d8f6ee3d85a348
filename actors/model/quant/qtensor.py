"""A quantised matrix as it lies in memory, whatever wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

QuantKind = Literal["int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """``W[n, k] = (data[n, k] - zero[n, k // group]) * scale[n, k // group]``, N rows of K columns.

    data: int8 or float8_e4m3fn [N, K]; for ``int4`` uint8 [N, K / 2], column 2j in the low nibble of byte j, unsigned.
    scale: [N, ceil(K / group)] floating. zero: uint8 as scale, or None: 0 (for int4: 8). columns: int64 [K] or None;
    stored column j is the matrix's column ``columns[j]`` (GPTQ's act order). ``int8_activations``: rows that are
    multiplied are quantised as well.
    """

    kind: QuantKind
    data: Tensor
    scale: Tensor
    group: int
    zero: Tensor | None = None
    columns: Tensor | None = None
    int8_activations: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, width = self.data.shape
        return rows, width * 2 if self.kind == "int4" else width

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        parts = (self.data, self.scale, self.zero, self.columns)
        return sum(part.nbytes for part in parts if part is not None)
