"""SwiGLU: the MLP of dense layers, shared experts and routed experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .linear import linear
from .pointwise import pointwise
from .reader import TensorReader


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """``down(silu(gate x) * (up x))``, no biases (arXiv 2002.05202).

    gate_up: [2I, D], the gate's rows first; down: [D, I].
    """

    gate_up: Tensor
    down: Tensor

    @classmethod
    def load(cls, read: TensorReader, names: tuple[str, str, str], d_model: int, inter: int) -> SwiGLU:
        """Read the (gate, up, down) matrices called ``names``."""
        gate, up, down = names
        gate_up = read.stacked([(gate, (inter, d_model)), (up, (inter, d_model))])
        return cls(gate_up, read(down, (d_model, inter)))

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: Tensor, row_block: int = 0) -> Tensor:
        """x: [R, D] in the weights' dtype; returns [R, D]. ``row_block`` as for :func:`linear`."""
        gate, up = linear(x, self.gate_up, row_block=row_block).chunk(2, dim=-1)
        return linear(pointwise(F.silu, gate, row_block) * up, self.down, row_block=row_block)
