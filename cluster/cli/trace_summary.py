"""What a trace says about who waits for whom, in few numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from expertmesh.v1 import control_pb2 as pb

from actors.span_log import ROWS_OUT
from cluster.compute_spans import COMPUTE, SHARED

_ROUTED = ("gate", "experts", "combine")


class Kind(NamedTuple):
    """The spans of one ``name`` of an actor: how many, their mean, and the share of the trace's time in which there was
    at least one."""

    actor: str
    name: str
    spans: int
    mean_s: float
    share: float


class Times(NamedTuple):
    """Means in seconds, None without such spans. ``attention``: what a batch of a MoE layer costs the attention shard
    that computes longest, its head and sampling left out. ``experts``: the expert shard that computes longest.
    ``transfer``: half of what a batch's time at its router exceeds that by, so one way."""

    attention: float | None
    experts: float | None
    transfer: float | None


def kinds(trace: pb.TraceResponse) -> list[Kind]:
    """By actor, and in the order in which each name appears first."""
    spans = [span for actor in trace.actors for span in actor.spans]
    if not spans:
        return []
    whole_ns = max(map(_end_ns, spans)) - min(span.start_ns for span in spans)
    found = []
    for actor in trace.actors:
        for name, of_kind in _by_name(actor).items():
            total_ns = sum(span.duration_ns for span in of_kind)
            share = _covered_ns(of_kind) / max(1, whole_ns)
            found.append(Kind(actor.name, name, len(of_kind), total_ns / len(of_kind) / 1e9, share))
    return found


def times(trace: pb.TraceResponse) -> Times:
    """T_a, T_e and T_c, as MegaScale-Infer (arXiv 2504.02263) has them, over all actors."""
    by_role = defaultdict(list)
    for actor in trace.actors:
        by_role[actor.role].append(_by_name(actor))
    attention = _longest(_per_batch(spans, (COMPUTE, SHARED), ROWS_OUT) for spans in by_role[pb.ROLE_ATTENTION])
    experts = _longest(_per_batch(spans, ("compute",), "compute") for spans in by_role[pb.ROLE_EXPERT])
    routed = _longest(_per_batch(spans, _ROUTED, "experts") for spans in by_role[pb.ROLE_ROUTER])
    transfer = None if experts is None or routed is None else max(0.0, routed - experts) / 2
    return Times(attention, experts, transfer)


def _by_name(actor: pb.TracedActor) -> dict[str, list[pb.TracedSpan]]:
    named = defaultdict(list)
    for span in actor.spans:
        named[span.name].append(span)
    return dict(named)


def _per_batch(spans: Mapping[str, Sequence[pb.TracedSpan]], names: Iterable[str], once: str) -> float | None:
    """Seconds of the spans of ``names`` for each one of ``once``, of which every batch has one."""
    batches = len(spans.get(once, ()))
    total_ns = sum(span.duration_ns for name in names for span in spans.get(name, ()))
    return total_ns / batches / 1e9 if batches else None


def _longest(seconds: Iterable[float | None]) -> float | None:
    return max((s for s in seconds if s is not None), default=None)


def _covered_ns(spans: Iterable[pb.TracedSpan]) -> int:
    covered = until = 0
    for span in sorted(spans, key=lambda span: span.start_ns):
        covered += max(0, _end_ns(span) - max(until, span.start_ns))
        until = max(until, _end_ns(span))
    return covered


def _end_ns(span: pb.TracedSpan) -> int:
    return span.start_ns + span.duration_ns
