"""Shares of time, and T_a, T_e and T_c."""

from __future__ import annotations

import pytest
from expertmesh.v1 import control_pb2 as pb

from cluster.cli.trace_summary import Kind, Times, kinds, times


def actor(name: str, role: pb.Role, *spans: tuple[str, int, int]) -> pb.TracedActor:
    told = [pb.TracedSpan(name=n, start_ns=start, duration_ns=end - start) for n, start, end in spans]
    return pb.TracedActor(name=name, role=role, pid=1, spans=told)


def test_shares_count_overlapping_spans_once() -> None:
    trace = pb.TraceResponse(
        actors=[
            actor("router-0", pb.ROLE_ROUTER, ("experts", 100, 300), ("experts", 200, 500), ("experts", 250, 260)),
            actor("expert-0", pb.ROLE_EXPERT, ("compute", 0, 100), ("compute", 900, 1000)),
        ]
    )
    assert kinds(trace) == [
        Kind("router-0", "experts", 3, pytest.approx(170e-9), pytest.approx(0.4)),
        Kind("expert-0", "compute", 2, pytest.approx(100e-9), pytest.approx(0.2)),
    ]


def test_times_of_a_layer() -> None:
    """Two layers of one step; of each fleet the slower actor counts."""
    busy = [("compute", 0, 50), ("rows out", 50, 60), ("shared expert", 60, 70), ("wait for experts", 70, 170)]
    later = [("compute", 170, 240), ("rows out", 240, 250), ("wait for experts", 250, 300), ("head", 300, 900)]
    routed = [("experts", 10, 90), ("combine", 90, 96)]
    trace = pb.TraceResponse(
        actors=[
            actor("attention-0", pb.ROLE_ATTENTION, ("step", 0, 900), ("forward", 0, 900), *busy, *later),
            actor("attention-1", pb.ROLE_ATTENTION, ("compute", 0, 10), ("rows out", 10, 20)),
            actor("attention-2", pb.ROLE_ATTENTION),
            actor("router-0", pb.ROLE_ROUTER, ("gate", 0, 10), ("dispatch", 0, 20), *routed),
            actor("expert-0", pb.ROLE_EXPERT, ("compute", 20, 60), ("compute", 120, 180)),
            actor("expert-1", pb.ROLE_EXPERT, ("compute", 20, 30)),
        ]
    )
    assert times(trace) == Times(pytest.approx(65e-9), pytest.approx(50e-9), pytest.approx(23e-9))


def test_nothing_to_tell() -> None:
    idle = pb.TraceResponse(actors=[actor("attention-0", pb.ROLE_ATTENTION), actor("expert-0", pb.ROLE_EXPERT)])
    assert kinds(idle) == []
    assert times(idle) == (None, None, None)
