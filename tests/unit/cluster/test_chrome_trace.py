"""What Perfetto and Chrome read."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from expertmesh.v1 import control_pb2 as pb

from cluster.cli.chrome_trace import chrome_trace
from tests.trace_events import check_events


def actor(name: str, *spans: pb.TracedSpan, **fields: Any) -> pb.TracedActor:
    return pb.TracedActor(**{"name": name, "pid": 7, "node_id": "ab12", "spans": spans, **fields})


def span(name: str, start: int, duration: int, lane: str = "loop", **numbers: int) -> pb.TracedSpan:
    return pb.TracedSpan(name=name, start_ns=start, duration_ns=duration, lane=lane, numbers=numbers)


def named(trace: dict[str, Any], kind: str) -> list[Any]:
    return [event["args"] for event in trace["traceEvents"] if event["name"] == kind]


def test_an_actor_is_a_process_and_a_lane_a_thread() -> None:
    start = 10**15 + 1
    told = pb.TraceResponse(
        actors=[
            actor("router-0", span("gate", start, 1500, layer=3), span("experts", start + 500, 10, "batch")),
            actor("expert-0", span("compute", start + 2001, 1, rows=4), dropped=3, clock_error_ns=1250),
            actor("expert-1", pid=0),
        ]
    )
    trace = chrome_trace(told)
    check_events(trace)
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"], e["args"]) for e in spans] == [
        ("gate", 1, 2, 0.0, 1.5, {"layer": 3}),
        ("experts", 1, 1, 0.5, 0.01, {}),
        ("compute", 2, 1, 2.001, 0.001, {"rows": 4}),
    ]
    assert [args["name"] for args in named(trace, "process_name")] == ["router-0", "expert-0", "expert-1"]
    assert [args["name"] for args in named(trace, "thread_name")] == ["batch", "loop", "loop"]
    assert [args["labels"] for args in named(trace, "process_labels")] == [
        "pid 7, node ab12",
        "pid 7, node ab12, clock ± 1.2 µs, 3 spans dropped",
        "did not answer",
    ]
    assert json.loads(json.dumps(trace)) == trace


def test_nothing_was_recorded() -> None:
    check_events(chrome_trace(pb.TraceResponse(actors=[actor("expert-0")])))


@pytest.mark.parametrize("seed", range(10))
def test_nested_spans_stay_nested_to_the_nanosecond(seed: int) -> None:
    """Starts as of a machine that has been up for three years."""
    draw = random.Random(seed)
    spans: list[pb.TracedSpan] = []

    def nest(start: int, end: int, depth: int) -> None:
        spans.append(span(f"depth {depth}", start, end - start))
        cuts = sorted(draw.randint(start, end) for _ in range(4))
        for begin, stop in ((cuts[0], cuts[1]), (cuts[1], cuts[3])) if depth < 6 else ():
            nest(begin, stop, depth + 1)

    nest(10**17, 10**17 + 10**9, 0)
    draw.shuffle(spans)
    check_events(chrome_trace(pb.TraceResponse(actors=[actor("attention-0", *spans)])))
