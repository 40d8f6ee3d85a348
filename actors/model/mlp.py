"""SwiGLU: the MLP of dense layers, shared experts and routed experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from actors.native import products
from actors.native.expert_places import ExpertPlaces

from .linear import Matrix, linear, native
from .pointwise import pointwise
from .reader import TensorReader


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """``down(silu(gate x) * (up x))``, no biases (arXiv 2002.05202).

    gate_up: [2I, D], the gate's rows first, or the two matrices [I, D] apart where one is quantised unlike the other
    or both stay where they lie in their file;
    down: [D, I].
    """

    gate_up: Matrix | tuple[Matrix, ...]
    down: Matrix
    nbytes: int = field(init=False)
    """Of all matrices. Found once: a model has tens of thousands of these, and whoever sums them up shall be quick."""

    places: ExpertPlaces | None = field(init=False, repr=False)
    """Where they lie, for the kernels; None: these cannot take them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(matrix.nbytes for matrix in self._matrices()))
        object.__setattr__(self, "places", ExpertPlaces.of(self.gate_up, self.down))

    @classmethod
    def load(cls, read: TensorReader, names: tuple[str, str, str], d_model: int, inter: int) -> SwiGLU:
        """Read the (gate, up, down) matrices called ``names``, see :meth:`TensorReader.projections`."""
        gate, up, down = names
        gate_up = read.projections([(gate, (inter, d_model)), (up, (inter, d_model))])
        return cls(gate_up, read.projection([(down, (d_model, inter))]))

    @classmethod
    def load_expert(cls, read: TensorReader, names: tuple[str, str, str], d_model: int, inter: int) -> SwiGLU:
        """Read the (gate, up, down) matrices called ``names``; quantised ones stay so."""
        gate, up, down = names
        gate_up = read.stacked_matrix([(gate, (inter, d_model)), (up, (inter, d_model))])
        return cls(gate_up, read.matrix(down, (d_model, inter)))

    @classmethod
    def load_fused(
        cls, read: TensorReader, names: tuple[str, str], count: int, index: int, d_model: int, inter: int
    ) -> SwiGLU:
        """Read expert ``index`` out of the fused (gate_up [count, 2I, D], down [count, D, I]) called ``names``."""
        gate_up, down = names
        return cls(
            read.matrix_entry(gate_up, count, index, (2 * inter, d_model)),
            read.matrix_entry(down, count, index, (d_model, inter)),
        )

    def __call__(self, x: Tensor, row_block: int = 0) -> Tensor:
        """x: [R, D] in the weights' dtype (quantised: any); returns [R, D]. ``row_block`` as for :func:`linear`."""
        if self.places is not None and self.places.take(x.dtype) and native(x.shape[0], row_block, x, self.down):
            return products.swiglu(x, self.places)
        if isinstance(self.gate_up, tuple):
            gate, up = (linear(x, matrix, row_block=row_block) for matrix in self.gate_up)
        else:
            gate, up = linear(x, self.gate_up, row_block=row_block).chunk(2, dim=-1)
        return linear(pointwise(F.silu, gate, row_block) * up, self.down, row_block=row_block)

    def _matrices(self) -> Iterator[Matrix]:
        yield from self.gate_up if isinstance(self.gate_up, tuple) else (self.gate_up,)
        yield self.down
