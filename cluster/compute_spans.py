"""What an attention shard computes between its exchanges with the experts.

Models know nothing of spans, so nothing marks these; but where a forward pass neither sends rows nor waits for them, it
computes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import attrgetter

from actors.span_log import FORWARD, HEAD, PUBLISH, ROWS_OUT, SAMPLE, WAIT, Span

COMPUTE, SHARED = "compute", "shared expert"

_EXCHANGES = (ROWS_OUT, WAIT)
_TOLD = (*_EXCHANGES, HEAD, SAMPLE, PUBLISH)
"""What a forward pass tells of itself; the rest of it is computing."""


def with_compute(spans: Iterable[Span]) -> list[Span]:
    """The spans of an attention shard by their start, with what they leave open inside each ``forward``.

    ``shared expert`` is what is computed between a batch's leaving and the next wait; ``compute`` all else: a layer's
    attention, and what is dense since the layer before.
    """
    ordered = by_start(spans)
    parts = [span for span in ordered if span.name in _TOLD]
    told = []
    for span in ordered:
        told.append(span)
        if span.name == FORWARD:
            told += _gaps(span, _inside(parts, span))
    return by_start(told)


def by_start(spans: Iterable[Span]) -> list[Span]:
    """By their start; what contains others comes before them."""
    return sorted(spans, key=lambda span: (span.start_ns, -span.duration_ns))


def _inside(parts: Sequence[Span], whole: Span) -> Sequence[Span]:
    start = attrgetter("start_ns")
    first, behind = (bisect_left(parts, ns, key=start) for ns in (whole.start_ns, whole.end_ns))
    return parts[first:behind]


def _gaps(forward: Span, parts: Sequence[Span]) -> list[Span]:
    gaps: list[Span] = []
    since, before = forward.start_ns, None
    for at, part in enumerate(parts):
        if part.start_ns > since:
            after = next((p for p in parts[at:] if p.name in _EXCHANGES), None)
            gaps.append(_gap(forward.lane, since, part.start_ns, before, after))
        since = part.end_ns
        if part.name in _EXCHANGES:
            before = part
    return gaps


def _gap(lane: str, since_ns: int, until_ns: int, before: Span | None, after: Span | None) -> Span:
    shared = before is not None and before.name == ROWS_OUT and after is not None and after.name == WAIT
    whose = before if shared or after is None else after
    numbers = {} if whose is None else {key: whose.numbers[key] for key in ("layer", "micro_batch")}
    return Span(SHARED if shared else COMPUTE, lane, since_ns, until_ns - since_ns, numbers)
