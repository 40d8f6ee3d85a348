"""What an attention shard computes between its exchanges with the experts.

Models know nothing of spans, so nothing marks these; but where a forward pass neither sends rows nor waits for them, it
computes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import attrgetter

from actors.span_log import ROWS_OUT, WAIT, Span

COMPUTE, SHARED, HEAD = "compute", "shared expert", "head"


def with_compute(spans: Iterable[Span]) -> list[Span]:
    """The spans of an attention shard by their start, with what they leave open inside each ``forward``.

    ``compute`` comes before a layer's rows are sent: its attention, and what is dense since the layer before.
    ``shared expert`` is what is computed between a batch's leaving and the next wait; ``head`` what comes after the
    last wait. Each ``step`` is also told its number of micro-batches.
    """
    ordered = by_start(spans)
    exchanges = [span for span in ordered if span.name in (ROWS_OUT, WAIT)]
    told = []
    for span in ordered:
        if span.name == "step":
            micro_batches = {exchange.numbers["micro_batch"] for exchange in _inside(exchanges, span)}
            span = span._replace(numbers={**span.numbers, "micro_batches": len(micro_batches)})
        told.append(span)
        if span.name == "forward":
            told += _gaps(span, _inside(exchanges, span))
    return by_start(told)


def by_start(spans: Iterable[Span]) -> list[Span]:
    """By their start; what contains others comes before them."""
    return sorted(spans, key=lambda span: (span.start_ns, -span.duration_ns))


def _inside(exchanges: Sequence[Span], whole: Span) -> Sequence[Span]:
    start = attrgetter("start_ns")
    first, behind = (bisect_left(exchanges, ns, key=start) for ns in (whole.start_ns, whole.end_ns))
    return exchanges[first:behind]


def _gaps(forward: Span, exchanges: Sequence[Span]) -> list[Span]:
    gaps = []
    since, before = forward.start_ns, forward
    for exchange in (*exchanges, None):
        until = exchange.start_ns if exchange else forward.end_ns
        if until > since:
            gaps.append(_gap(forward.lane, since, until, before, exchange))
        if exchange is not None:
            since, before = exchange.end_ns, exchange
    return gaps


def _gap(lane: str, since_ns: int, until_ns: int, before: Span, after: Span | None) -> Span:
    if after is None:
        return Span(HEAD, lane, since_ns, until_ns - since_ns, {})
    shared = before.name == ROWS_OUT and after.name == WAIT
    whose = before if shared else after
    numbers = {key: whose.numbers[key] for key in ("layer", "micro_batch")}
    return Span(SHARED if shared else COMPUTE, lane, since_ns, until_ns - since_ns, numbers)
