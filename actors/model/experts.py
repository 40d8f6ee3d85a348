"""A set of routed experts, held by one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from actors.native.library import library
from actors.quant_kind import QuantKind

from .errors import MissingExpert
from .expert_table import native_tables
from .heap import HeapTrimmer
from .linear import MANY_OF_EXPERTS, native
from .mlp import SwiGLU
from .parallel import READERS, load_each
from .reader import TensorReader
from .spec import MoEDecoderSpec
from .weights import Checkpoint


class ExpertBank:
    """Some (layer, expert) pairs of a model and their SwiGLU weights."""

    def __init__(
        self, held: Mapping[tuple[int, int], SwiGLU], d_model: int, dtype: torch.dtype, row_block: int = 0
    ) -> None:
        self._held = dict(held)
        self.experts = frozenset(self._held)
        """The (layer, expert) pairs held."""
        self.nbytes = sum(expert.nbytes for expert in self._held.values())
        """Of all weights held."""
        self._d_model = d_model
        self._dtype = dtype
        self._row_block = row_block
        self._tables = native_tables(self._held)

    @classmethod
    def load(
        cls,
        spec: MoEDecoderSpec,
        checkpoint: Checkpoint,
        experts: Iterable[tuple[int, int]],
        dtype: torch.dtype,
        row_block: int = 0,
        progress: Callable[[int], None] | None = None,
        device: torch.device | str = "cpu",
        quantization: QuantKind | None = None,
        readers: int = READERS,
    ) -> ExpertBank:
        """Read the given (layer, expert) pairs and nothing else, ``readers`` at a time.

        Matrices that are stored quantised stay so; ``quantization`` quantises plain ones as they are read. ``progress``
        gets bytes as they are read, from one thread at a time. Raises CheckpointError for what the checkpoint lacks,
        ValueError for a pair that the model does not have, for ``quantization`` of a quantised checkpoint, and for a
        wrong EXPERTMESH_ISA.
        """
        library()  # a wrong choice of the kernels is told here, not in the first step
        wanted = sorted(set(experts))
        for layer, expert in wanted:
            if layer not in spec.moe_layers or not 0 <= expert < spec.moe.n_experts:
                raise ValueError(
                    f"expert {expert} of layer {layer}: the model has experts 0..{spec.moe.n_experts - 1} "
                    f"in layers {list(spec.moe_layers)}"
                )
        read = TensorReader(checkpoint, dtype, device, progress, spec.quantization, quantization)
        heap = HeapTrimmer()

        def load_one(pair: tuple[int, int]) -> SwiGLU:
            expert = _load_expert(spec, checkpoint, read, *pair)
            if read.leaves_holes:
                heap.loaded(expert.nbytes)
            return expert

        loaded = load_each(load_one, wanted, readers, read.leaves_holes)
        return cls(dict(zip(wanted, loaded, strict=True)), spec.d_model, dtype, row_block)

    def with_(self, other: ExpertBank) -> ExpertBank:
        """A bank of what both hold; the weights are shared, not copied."""
        return ExpertBank({**self._held, **other._held}, self._d_model, self._dtype, self._row_block)

    def only(self, experts: Iterable[tuple[int, int]]) -> ExpertBank:
        """A bank of those of ``experts`` that this one holds."""
        kept = set(experts)
        held = {key: weights for key, weights in self._held.items() if key in kept}
        return ExpertBank(held, self._d_model, self._dtype, self._row_block)

    def calls(self) -> list[tuple[int, int, int, int, int, int, float]]:
        """For who calls the kernels himself, of each layer that they compute: its number and :meth:`ExpertTable.call`.
        Valid as long as this bank."""
        found = {layer: table.call(self._row_block, self._dtype) for layer, table in self._tables.items()}
        return [(layer, *call) for layer, call in found.items() if call is not None]

    @torch.inference_mode()
    def forward(self, layer: int, rows: Tensor, pair_row: Tensor, pair_expert: Tensor) -> Tensor:
        """Unweighted outputs, one per pair, in the order of the pairs.

        rows: [R, D] in the bank's dtype; pair_row, pair_expert: int [P], pair p sends row ``pair_row[p]`` to
        expert ``pair_expert[p]``. Returns [P, D]. Raises MissingExpert, before computing, for an expert not
        held, ValueError for rows of another width or dtype.
        """
        if rows.shape[1] != self._d_model:
            raise ValueError(f"rows have {rows.shape[1]} columns, the experts take {self._d_model}")
        if rows.dtype != self._dtype:
            raise ValueError(f"rows are {rows.dtype}, this bank computes in {self._dtype}")
        if pair_row.shape != pair_expert.shape:
            raise ValueError(f"{pair_row.shape[0]} rows of pairs, but {pair_expert.shape[0]} experts")
        table = self._tables.get(layer)
        each = 0.0 if table is None else pair_row.shape[0] / table.held
        if table is not None and native(each, self._row_block, rows, table.down, many=MANY_OF_EXPERTS):
            return table.forward(layer, rows, pair_row, pair_expert)
        order = torch.argsort(pair_expert, stable=True)
        numbers, counts = torch.unique_consecutive(pair_expert[order], return_counts=True)
        wanted = [
            (self._expert(layer, number), order_part)
            for number, order_part in zip(numbers.tolist(), torch.split(order, counts.tolist()), strict=True)
        ]
        out = rows.new_empty(pair_row.shape[0], self._d_model)
        for expert, pairs in wanted:
            out[pairs] = expert(rows[pair_row[pairs]], self._row_block)
        return out

    def _expert(self, layer: int, expert: int) -> SwiGLU:
        held = self._held.get((layer, expert))
        if held is None:
            raise MissingExpert(layer, expert)
        return held


def _load_expert(spec: MoEDecoderSpec, checkpoint: Checkpoint, read: TensorReader, layer: int, expert: int) -> SwiGLU:
    """From tensors of its own, or, where there are none, from its entries of the layer's fused ones."""
    names, d_model, inter = spec.names, spec.d_model, spec.moe.inter
    if names.is_fused(layer, expert, checkpoint.has):
        return SwiGLU.load_fused(read, names.fused_experts(layer), spec.moe.n_experts, expert, d_model, inter)
    return SwiGLU.load_expert(read, names.expert(layer, expert), d_model, inter)
