"""The least time that a case can take on this machine: bytes that have to be read, operations to be done. Pure.

The roofline model (Williams, Waterman, Patterson 2009): of both bounds the larger counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.model.inventory import Inventory
from actors.model.spec import MoEDecoderSpec
from benchmarks.speed_cases import Case
from benchmarks.speed_figures import Precision

BYTES: dict[Precision, float] = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Of a parameter, scales left out: the roof of the quantised formats is a little too high."""
_KV_BYTES = 2


@dataclass(frozen=True)
class Machine:
    """What it can do at all. ``bandwidth``: bytes a second read from memory by all cores; operations a second (a
    multiplication and an addition are two), the best of all ways that were tried: ``float_ops`` in bf16 or fp32,
    ``int_ops`` in int8."""

    bandwidth: float
    float_ops: float
    int_ops: float


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters, and of a token. ``body``: what every token is multiplied with but the head; ``expert``: a
    routed one's. ``score_width``: operations of one query and one key over all layers, halved; ``kv_floats``: what a
    token leaves in the cache."""

    body: int
    head: int
    embed: int
    expert: int
    layers: int
    experts: int
    top_k: int
    kv_floats: int
    score_width: int

    @classmethod
    def of(cls, spec: MoEDecoderSpec) -> Shapes:
        """Counted from a model's description."""
        parts, attn = Inventory.of(spec), spec.attn
        values = attn.v_dim if attn.kind == "mla" else attn.head_dim
        return cls(
            body=parts.norms + parts.attention + parts.gates + parts.shared + parts.dense,
            head=parts.head or parts.embed,
            embed=parts.embed if parts.head else 0,
            expert=parts.expert,
            layers=len(spec.moe_layers),
            experts=spec.moe.n_experts,
            top_k=spec.moe.top_k,
            kv_floats=spec.kv_floats_per_token,
            score_width=spec.n_layers * attn.heads * (attn.head_dim + values),
        )

    @property
    def total(self) -> int:
        """All parameters."""
        return self.body + self.head + self.embed + self.layers * self.experts * self.expert

    def weight_bytes(self, precision: Precision) -> float:
        """Of all weights, embeddings and head too, all kept alike."""
        return self.total * BYTES[precision]


Popularity = Sequence[Sequence[float]]
"""Of each MoE layer, the part of all tokens that goes to each expert: sums to top_k."""


def popularity(shapes: Shapes, rows: Sequence[Sequence[int]] = ()) -> Popularity:
    """From the rows that were counted by layer and expert; where none were, all experts alike."""
    even = [shapes.top_k / shapes.experts] * shapes.experts
    if not rows or not all(sum(layer) for layer in rows):
        return [even] * shapes.layers
    return [[min(1.0, shapes.top_k * count / sum(layer)) for count in layer] for layer in rows]


def distinct(tokens: int, shares: Sequence[float]) -> float:
    """Experts of a layer that so many tokens are expected to hit, drawn independently of each other."""
    return sum(1 - (1 - share) ** tokens for share in shares)


def step_bytes(shapes: Shapes, precision: Precision, streams: int, context: float, shares: Popularity) -> float:
    """Read in a step of one token a stream, each of which sees ``context`` tokens."""
    hit = sum(distinct(streams, layer) for layer in shares)
    weights = shapes.body + shapes.head + hit * shapes.expert
    return weights * BYTES[precision] + streams * context * shapes.kv_floats * _KV_BYTES


def token_ops(shapes: Shapes, context: float) -> float:
    """Of one token through all layers, without the head."""
    return 2 * (shapes.body + shapes.layers * shapes.top_k * shapes.expert + shapes.score_width * context)


def step_seconds(
    shapes: Shapes, precision: Precision, streams: int, context: float, shares: Popularity, at: Machine
) -> float:
    """The least for a decode step."""
    ops = streams * (token_ops(shapes, context) + 2 * shapes.head)
    return max(step_bytes(shapes, precision, streams, context, shares) / at.bandwidth, ops / _ops(precision, at))


def prefill_seconds(shapes: Shapes, precision: Precision, case: Case, shares: Popularity, at: Machine) -> float:
    """The least for all prompts of a case: every weight is read once, a token sees half of its prompt in the mean."""
    tokens = case.streams * case.prompt
    ops = tokens * token_ops(shapes, case.prompt / 2) + case.streams * 2 * shapes.head
    hit = sum(distinct(tokens, layer) for layer in shares)
    read = (shapes.body + shapes.head + hit * shapes.expert) * BYTES[precision]
    return max(read / at.bandwidth, ops / _ops(precision, at))


def roof(shapes: Shapes, precision: Precision, case: Case, shares: Popularity, at: Machine) -> float:
    """Tokens a second that the machine allows, counted as :class:`benchmarks.speed_cases.Figure` counts them."""
    prefill = prefill_seconds(shapes, precision, case, shares, at)
    if case.kind == "prefill":
        return case.streams * case.prompt / prefill
    step = step_seconds(shapes, precision, case.streams, case.prompt + case.new / 2, shares, at)
    if case.kind == "decode":
        return case.streams / step
    return case.streams * case.new / (prefill + (case.new - 1) * step)


def _ops(precision: Precision, at: Machine) -> float:
    """Quantised weights may be multiplied as integers, or widened to what is faster."""
    return at.float_ops if precision == "bf16" else max(at.float_ops, at.int_ops)
