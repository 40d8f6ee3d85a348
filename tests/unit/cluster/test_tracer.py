"""A trace of actors that may be late, dead, on other machines, or have too much to tell."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2 import Role

from actors.span_log import Recording, Span, clock_name
from cluster import tracer
from cluster.fleet import ActorHandle, ActorUnreachable
from cluster.refusals import BadOperation, TraceRunning
from cluster.roster import Member
from cluster.tracer import Tracer, check

ELSEWHERE = "another machine"


class Actor:
    """Records what it is told to have done. Its steps are done once ``steps_done`` is set."""

    def __init__(self, spans: list[Span] | None = None, clock: str = "", ahead_ns: int = 0) -> None:
        self.spans = spans or []
        self.clock_name = clock or clock_name()
        self.ahead_ns = ahead_ns
        self.steps_done = threading.Event()
        self.calls: list[tuple[Any, ...]] = []

    def clock(self) -> int:
        return time.monotonic_ns() + self.ahead_ns

    def start_spans(self, limit_steps: int, limit_s: float) -> None:
        self.calls.append(("start", limit_steps))

    def wait_for_steps(self, timeout_s: float) -> None:
        self.calls.append(("wait", timeout_s))
        self.steps_done.wait(timeout_s)

    def take_spans(self) -> Recording:
        self.calls.append(("take",))
        self.steps_done.set()
        return Recording(99, self.clock_name, list(map(tuple, self.spans)), 0)  # type: ignore[arg-type]


class Handle(ActorHandle):
    """Calls an actor in a pool; ``dead`` methods fail, ``hung`` ones never return."""

    def __init__(self, name: str, actor: Any, pool: ThreadPoolExecutor) -> None:
        self.name, self.actor, self._pool = name, actor, pool
        self.dead: set[str] = set()
        self.hung: set[str] = set()
        self.begun: list[str] = []

    def begin(self, method: str, *args: Any) -> Future[Any]:
        self.begun.append(method)
        future: Future[Any] = Future()
        if method in self.dead:
            future.set_exception(ActorUnreachable(f"{self.name} is gone"))
        elif method not in self.hung:
            return self._pool.submit(getattr(self.actor, method), *args)
        return future


class Cast:
    """Two attention shards with a router each, two expert shards and a gateway; and their tracer."""

    def __init__(self, pool: ThreadPoolExecutor, max_bytes: int = 2**26) -> None:
        roles = {
            "gateway-0": Role.ROLE_GATEWAY,
            "expert-0": Role.ROLE_EXPERT,
            "expert-1": Role.ROLE_EXPERT,
            "router-0": Role.ROLE_ROUTER,
            "router-1": Role.ROLE_ROUTER,
            "attention-0": Role.ROLE_ATTENTION,
            "attention-1": Role.ROLE_ATTENTION,
        }
        self.actors = {name: Actor() for name in roles}
        self.handles = {name: Handle(name, actor, pool) for name, actor in self.actors.items()}
        self.members = [Member(role, self.handles[name], None) for name, role in roles.items()]
        self.tracer = Tracer(lambda: self.members, lambda handle: f"node of {handle.name}", max_bytes)
        self.shards = [self.actors["attention-0"], self.actors["attention-1"]]

    def trace(self, steps: int = 2, timeout_s: float = 60.0, caller: str = "me") -> dict[str, pb.TracedActor]:
        self.response = self.tracer.trace(steps, timeout_s, caller)
        return {actor.name: actor for actor in self.response.actors}

    def done(self) -> None:
        for shard in self.shards:
            shard.steps_done.set()


@pytest.fixture
def pool() -> Any:
    with ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def cast(pool: ThreadPoolExecutor) -> Cast:
    return Cast(pool)


def step(start: int, end: int) -> Span:
    return Span("step", "loop", start, end - start, {"number": 1})


def span(start: int, end: int, **numbers: int) -> Span:
    return Span("compute", "loop", start, end - start, numbers)


def test_everybody_records_before_the_steps_begin_and_stops_after_them(cast: Cast) -> None:
    begun: list[str] = []
    for name, actor in cast.actors.items():
        actor.start_spans = lambda *limits, name=name: begun.append((name, *limits))  # type: ignore
    cast.done()
    traced = cast.trace(steps=7, timeout_s=3.0)
    long = 3.0 + tracer._ABANDONED_S
    assert sorted(begun[:5]) == [(n, 0, long) for n in ("expert-0", "expert-1", "gateway-0", "router-0", "router-1")]
    assert sorted(begun[5:]) == [("attention-0", 7, long), ("attention-1", 7, long)]
    assert all(shard.calls == [("wait", 3.0), ("take",)] for shard in cast.shards)
    assert all(actor.calls[-1] == ("take",) for actor in cast.actors.values())
    assert list(traced) == list(cast.actors)
    assert {actor.pid for actor in traced.values()} == {99}
    assert traced["expert-1"].role == Role.ROLE_EXPERT
    assert traced["expert-1"].node_id == "node of expert-1"


def test_steps_are_those_of_the_shard_with_the_fewest(cast: Cast) -> None:
    cast.shards[0].spans = [step(100, 200), step(200, 300), step(300, 400)]
    cast.shards[1].spans = [step(150, 250)]
    cast.done()
    cast.trace(3)
    assert cast.response.steps == 1


def test_after_the_timeout_there_is_what_there_is(cast: Cast) -> None:
    cast.shards[0].spans = [step(100, 200)]
    cast.shards[0].steps_done.set()
    traced = cast.trace(5, timeout_s=0.05)
    assert len(traced["attention-0"].spans) == 1
    assert traced["attention-1"].pid == 99
    assert cast.response.steps == 0


def test_zero_means_the_default_timeout(cast: Cast) -> None:
    cast.done()
    cast.trace(timeout_s=0.0)
    assert ("wait", 30.0) in cast.shards[0].calls


def test_who_is_dead_is_named_without_spans_and_not_waited_for(cast: Cast) -> None:
    cast.shards[0].spans = [step(100, 200)]
    cast.shards[0].steps_done.set()
    for name in ("attention-1", "expert-0"):
        cast.handles[name].dead = {"start_spans", "wait_for_steps", "take_spans", "clock"}
    traced = cast.trace()
    assert [name for name, actor in traced.items() if not actor.pid] == ["expert-0", "attention-1"]
    assert cast.response.steps == 1


def test_who_hangs_costs_a_while_and_nobody_else(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer, "_TAKE_S", 0.1)
    cast.shards[0].spans = [step(100, 200)]
    cast.done()
    cast.handles["router-1"].hung = {"take_spans"}
    traced = cast.trace()
    assert [name for name, actor in traced.items() if not actor.pid] == ["router-1"]
    assert len(traced["attention-0"].spans) == 1


def test_recording_stops_everywhere_whatever_fails(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(tracer, "wait", fail)
    with pytest.raises(MemoryError):
        cast.trace()
    assert all(actor.calls[-1] == ("take",) for actor in cast.actors.values())
    monkeypatch.undo()
    cast.done()
    cast.trace()


def test_one_at_a_time_and_it_ends_with_its_caller(cast: Cast, pool: ThreadPoolExecutor) -> None:
    waiting = threading.Event()
    honest = cast.shards[0].wait_for_steps
    cast.shards[0].wait_for_steps = lambda timeout_s: (waiting.set(), honest(timeout_s))  # type: ignore
    first = pool.submit(cast.trace, caller="first")
    assert waiting.wait(60)
    with pytest.raises(TraceRunning):
        cast.tracer.trace(1, 1.0, "second")
    cast.tracer.stop("second")
    assert "take_spans" not in cast.handles["attention-0"].begun
    cast.tracer.stop("first")
    first.result(60)
    cast.tracer.stop("first")
    cast.done()
    cast.trace(caller="second")


def test_a_caller_who_goes_before_anything_began_ends_it_too(cast: Cast) -> None:
    """While it is looked up who is on duty."""

    def members() -> list[Member]:
        cast.tracer.stop("me")
        return cast.members

    honest, cast.tracer._members = cast.tracer._members, members
    cast.trace()
    assert "wait_for_steps" not in cast.handles["attention-0"].begun
    assert all(actor.calls[-1] == ("take",) for actor in cast.actors.values())
    cast.tracer._members = honest
    cast.done()
    cast.trace()
    assert "wait_for_steps" in cast.handles["attention-0"].begun


def test_a_trace_that_fails_at_once_does_not_stop_the_next_one(cast: Cast) -> None:
    def nobody() -> list[Member]:
        cast.tracer.stop("first")
        raise RuntimeError("stopping")

    honest, cast.tracer._members = cast.tracer._members, nobody
    with pytest.raises(RuntimeError, match="stopping"):
        cast.trace(caller="first")
    cast.tracer.stop("first")
    assert not cast.handles["attention-0"].begun
    cast.tracer._members = honest
    cast.done()
    cast.trace(caller="second")
    assert "wait_for_steps" in cast.handles["attention-0"].begun


def test_spans_come_to_our_clock(cast: Cast) -> None:
    """Two actors of a machine whose clock is an hour ahead, one of a machine that cannot be asked."""
    ahead = 3600 * 10**9
    cast.shards[0].spans = [step(10**6, 9 * 10**6)]
    for name in ("expert-0", "router-0"):
        actor = cast.actors[name]
        actor.clock_name, actor.ahead_ns, actor.spans = ELSEWHERE, ahead, [span(ahead + 5 * 10**6, ahead + 6 * 10**6)]
    cast.handles["router-0"].dead = {"clock"}
    cast.actors["expert-1"].clock_name = "a third"
    cast.handles["expert-1"].dead = {"clock"}
    cast.done()
    traced = cast.trace()
    for name in ("expert-0", "router-0"):
        (shifted,) = traced[name].spans
        error = traced[name].clock_error_ns
        assert 0 < error < 10**8
        assert abs(shifted.start_ns - 5 * 10**6) <= error
        assert shifted.duration_ns == 10**6
    assert traced["attention-0"].clock_error_ns == 0
    assert traced["attention-0"].spans[0].start_ns == 10**6
    assert traced["expert-1"].pid == 0


def test_only_what_belongs_to_the_steps(cast: Cast) -> None:
    cast.shards[0].spans = [step(1000, 2000)]
    late = 2000 + tracer._DELIVERY_NS
    times = ((0, 999), (500, 1000), (1500, 1600), (late, late), (late + 1, late + 2))
    cast.actors["expert-0"].spans = [span(*pair) for pair in times]
    cast.done()
    assert [s.start_ns for s in cast.trace()["expert-0"].spans] == [500, 1500, late]


@pytest.mark.parametrize("room", [1000, 4000, 2**26])
def test_an_answer_keeps_to_its_bounds_and_loses_the_oldest(pool: ThreadPoolExecutor, room: int) -> None:
    cast = Cast(pool, max_bytes=room)
    cast.shards[0].spans = [step(1, 10**6)]
    cast.actors["expert-0"].spans = [span(1000 * n, 1000 * n + 500, layer=n) for n in range(100)]
    cast.actors["expert-1"].spans = [span(1000 * n + 1, 1000 * n + 2) for n in range(100)]
    cast.done()
    traced = cast.trace()
    assert cast.response.ByteSize() <= room
    kept = {name: [s.start_ns for s in traced[name].spans] for name in ("expert-0", "expert-1")}
    for name, actor in traced.items():
        assert len(actor.spans) + actor.dropped == len(cast.actors[name].spans)
    if room == 2**26:
        assert not any(actor.dropped for actor in traced.values())
        return
    assert kept["expert-0"] == [1000 * n for n in range(100)][100 - len(kept["expert-0"]) :]
    assert 0 <= len(kept["expert-1"]) - len(kept["expert-0"]) <= 1
    assert cast.response.ByteSize() > room // 2
    assert cast.response.steps == 0


@pytest.mark.parametrize(
    ("steps", "timeout_s", "field"),
    [
        (0, 1.0, "steps"),
        (1001, 1.0, "steps"),
        (1, -1.0, "timeout_s"),
        (1, 600.1, "timeout_s"),
        (1, math.nan, "timeout_s"),
        (1, math.inf, "timeout_s"),
    ],
)
def test_what_cannot_be_asked(cast: Cast, steps: int, timeout_s: float, field: str) -> None:
    with pytest.raises(BadOperation, match="allowed are") as refusal:
        cast.trace(steps, timeout_s)
    assert refusal.value.field == field
    assert not any(actor.calls for actor in cast.actors.values())


def test_the_bounds_themselves_are_allowed() -> None:
    check(1, 0.0)
    check(1000, 600.0)
