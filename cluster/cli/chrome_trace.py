"""A recorded trace in Chrome's Trace Event Format, which https://ui.perfetto.dev and chrome://tracing read.

The format: "Trace Event Format", Nat Duca and Dan Sinclair, Google. Times are in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from expertmesh.v1 import control_pb2 as pb

Event = dict[str, Any]


def chrome_trace(trace: pb.TraceResponse) -> dict[str, Any]:
    """One process for each actor, one thread for each of its lanes; time 0 is the first span's start."""
    zero_ns = min((span.start_ns for actor in trace.actors for span in actor.spans), default=0)
    named: list[Event] = []
    spans: list[Event] = []
    # by number: actors of different machines may have the same process id
    for number, actor in enumerate(trace.actors, start=1):
        lanes = {lane: n for n, lane in enumerate(sorted({span.lane for span in actor.spans}), start=1)}
        named += _names(actor, number, lanes)
        spans += [_span(span, number, lanes[span.lane], zero_ns) for span in actor.spans]
    spans.sort(key=lambda event: (event["ts"], -event["dur"]))
    return {"traceEvents": named + spans, "displayTimeUnit": "ms"}


def _names(actor: pb.TracedActor, number: int, lanes: dict[str, int]) -> Iterator[Event]:
    facts = [f"pid {actor.pid}", f"node {actor.node_id}"] if actor.pid else ["did not answer"]
    if actor.clock_error_ns:
        facts.append(f"clock ± {actor.clock_error_ns / 1000:.1f} µs")
    if actor.dropped:
        facts.append(f"{actor.dropped} spans dropped")
    yield _meta("process_name", number, name=actor.name)
    yield _meta("process_labels", number, labels=", ".join(facts))
    yield _meta("process_sort_index", number, sort_index=number)
    for lane, tid in lanes.items():
        yield {**_meta("thread_name", number, name=lane), "tid": tid}


def _meta(kind: str, pid: int, **arguments: Any) -> Event:
    return {"name": kind, "ph": "M", "ts": 0, "pid": pid, "tid": 0, "args": arguments}


def _span(span: pb.TracedSpan, pid: int, tid: int, zero_ns: int) -> Event:
    return {
        "name": span.name,
        "cat": "expertmesh",
        "ph": "X",
        "ts": (span.start_ns - zero_ns) / 1000,
        "dur": span.duration_ns / 1000,
        "pid": pid,
        "tid": tid,
        "args": dict(sorted(span.numbers.items())),
    }
