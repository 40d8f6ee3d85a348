"""How large a model is, part by part, and how much of it a shard holds. Arithmetic on its description alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from actors.quant_kind import QuantKind

from .quant.layout import kept_bytes
from .quant.scheme import QuantScheme
from .spec import MoEDecoderSpec
from .tensor_list import expert_tensors, fused_tensors, resident_tensors


@dataclass(frozen=True, slots=True)
class Inventory:
    """Parameters of a model. ``embed`` to ``dense``: of all layers together; ``head`` is 0 where the embeddings are the
    head as well; ``expert``: of one routed expert of one layer. Multi-token-prediction layers are not in it.

    ``experts``: (layer, expert) pairs there are; ``active_experts``: those that a token passes.
    """

    embed: int
    head: int
    norms: int
    attention: int
    gates: int
    shared: int
    dense: int
    expert: int
    experts: int
    active_experts: int
    d_model: int

    @classmethod
    def of(cls, spec: MoEDecoderSpec) -> Inventory:
        """Count the tensors that the model's checkpoint holds."""
        counts: Counter[str] = Counter()
        for tensor in resident_tensors(spec):
            counts[tensor.part] += tensor.numel
        layers = spec.moe_layers
        return cls(
            embed=counts["embed"],
            head=counts["head"],
            norms=counts["norm"],
            attention=counts["attention"],
            gates=counts["gate"],
            shared=counts["shared"],
            dense=counts["dense"],
            expert=sum(tensor.numel for layer in layers[:1] for tensor in expert_tensors(spec, layer, 0)),
            experts=len(layers) * spec.moe.n_experts,
            active_experts=len(layers) * spec.moe.top_k,
            d_model=spec.d_model,
        )

    @property
    def total(self) -> int:
        """All parameters, correction biases too."""
        return self.attention_shard + self.gates + self.experts * self.expert

    @property
    def active(self) -> int:
        """Parameters that one token is multiplied with, and its row of the embeddings."""
        lookup = self.embed - self.d_model if self.head else 0
        return self.attention_shard - lookup + self.gates + self.active_experts * self.expert

    @property
    def attention_shard(self) -> int:
        """What each attention shard holds: all but gates and routed experts."""
        return self.embed + self.head + self.norms + self.attention + self.shared + self.dense

    def experts_per_shard(self, shards: int) -> int:
        """(layer, expert) pairs of the fullest of ``shards`` expert shards."""
        return -(-self.experts // shards)

    def shards_for(self, memory: int, expert_bytes: int) -> int | None:
        """Fewest expert shards that hold all experts with ``memory`` bytes each; None: not one expert fits."""
        held = memory // expert_bytes
        return -(-self.experts // held) if held else None


def expert_shapes(spec: MoEDecoderSpec) -> list[tuple[int, int]]:
    """[N, K] of a routed expert's matrices as they are kept: gate over up, down; empty for a model without."""
    fused = (tensor for layer in spec.moe_layers[:1] for tensor in fused_tensors(spec, layer))
    return [(tensor.shape[1], tensor.shape[2]) for tensor in fused]


def bytes_at_load(shapes: Iterable[tuple[int, int]], kind: QuantKind) -> int:
    """Bytes of matrices that were quantised at load, with scales and zero points."""
    return sum(_quantized_bytes(shape, kind) for shape in shapes)


def resident_bytes(spec: MoEDecoderSpec, kind: QuantKind | None = None) -> int:
    """Bytes of an attention shard's weights, computed in the model's dtype; ``kind``: as what its matrices are
    quantised at load, with a copy of tied embeddings as the head."""
    itemsize = spec.itemsize
    if kind is None:
        return Inventory.of(spec).attention_shard * itemsize
    total = bytes_at_load([(spec.vocab_size, spec.d_model)], kind) if spec.tie_embeddings else 0
    for tensor in resident_tensors(spec):
        if tensor.part != "gate":
            shape = tensor.projection
            total += tensor.numel * itemsize if shape is None else _quantized_bytes(shape, kind)
    return total


def held_bytes(
    shapes: Iterable[tuple[int, int]], scheme: QuantScheme | None, itemsize: int, scale_bytes: int | None = None
) -> int:
    """Bytes of matrices as a shard keeps them that quantises nothing: as they are stored, cast if they are not
    quantised. ``itemsize``: of the dtype it computes in. ``scale_bytes``: of a scale in memory, which config.json does
    not tell; None: what is usual, see :func:`kept_bytes`."""
    if scheme is None:
        return sum(rows * width * itemsize for rows, width in shapes)
    return sum(kept_bytes(scheme, shape, scale_bytes) for shape in shapes)


def _quantized_bytes(shape: tuple[int, int], kind: QuantKind) -> int:
    from .quant.quantize import quantized_bytes  # loads torch: what is not quantised is counted without

    return quantized_bytes(shape, kind)
