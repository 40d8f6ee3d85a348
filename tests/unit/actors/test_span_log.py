"""What an actor records while somebody traces it, and that it is nothing otherwise."""

from __future__ import annotations

import pickle
import threading
import time
from types import SimpleNamespace

import pytest

from actors import span_log
from actors.span_log import LOOP, Recorded, Span, SpanLog, clock_name


class Clock:
    """Nanoseconds, by hand."""

    def __init__(self) -> None:
        self.now = 1000

    def monotonic_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(span_log, "time", SimpleNamespace(monotonic_ns=clock.monotonic_ns))
    return clock


def step(log: SpanLog, clock: Clock, number: int) -> None:
    began = log.begin_step()
    clock.now += 10
    part = log.begin()
    clock.now += 5
    if part:
        log.end("part", part)
    if began:
        log.end_step(began, number=number)


def test_nothing_is_recorded_unless_asked(clock: Clock) -> None:
    log = SpanLog()
    assert log.begin() == log.begin_step() == 0
    assert log.take().spans == []


def test_spans_have_their_times_lane_and_numbers(clock: Clock) -> None:
    log = SpanLog()
    log.start()
    began = log.begin()
    clock.now += 40
    log.end("experts", began, "batch", layer=3, rows=7)
    log.end("gate", clock.now)
    clock.now += 1
    taken = log.take()
    assert taken.spans == [Span("experts", "batch", 1000, 40, {"layer": 3, "rows": 7}), Span("gate", LOOP, 1040, 0, {})]
    assert taken.spans[0].end_ns == 1040
    assert (taken.dropped, taken.clock) == (0, clock_name())
    assert pickle.loads(pickle.dumps(taken)) == taken  # noqa: S301
    assert log.begin() == 0
    assert log.take().spans == []


def test_what_began_before_the_recording_is_not_in_it(clock: Clock) -> None:
    log = SpanLog()
    log.start()
    before = log.begin()
    clock.now += 1
    log.start()
    log.end("old", before)
    log.end_step(before)
    assert log.take().spans == []


def test_only_so_many_are_kept(clock: Clock) -> None:
    log = SpanLog(capacity=2)
    for _ in range(2):
        log.start()
        for name in "abc":
            log.end(name, log.begin())
        taken = log.take()
        assert [span.name for span in taken.spans] == ["a", "b"]
        assert taken.dropped == 1


def test_whole_steps_as_many_as_wanted(clock: Clock) -> None:
    log = SpanLog()
    log.start(limit_steps=2)
    inside = log.begin()  # a step is under way already
    assert inside == 0
    for number in range(4):
        step(log, clock, number)
    spans = log.take().spans
    assert [span.name for span in spans] == ["part", "step", "part", "step"]
    assert [span.numbers["number"] for span in spans if span.name == "step"] == [0, 1]
    assert [span.duration_ns for span in spans] == [5, 15, 5, 15]


def test_who_waits_is_told_of_the_last_step(clock: Clock) -> None:
    log = SpanLog()
    log.start(limit_steps=1)
    came = threading.Event()
    waiting = threading.Thread(target=lambda: (log.wait(60), came.set()))
    waiting.start()
    assert not came.is_set()
    step(log, clock, 0)
    waiting.join(60)
    assert came.is_set()
    log.start(limit_steps=1)
    assert not log._over.wait(0), "a new recording is waited for anew"
    log.take()
    log.wait(60)


def test_a_taken_recording_of_steps_does_not_begin(clock: Clock) -> None:
    log = SpanLog()
    log.start(limit_steps=1)
    log.take()
    step(log, clock, 0)
    assert log.take().spans == []


@pytest.mark.parametrize("late", [False, True])
def test_a_recording_that_nobody_takes_stops_by_itself(clock: Clock, late: bool) -> None:
    log = SpanLog(capacity=1)
    log.start(limit_s=5)
    began = log.begin()
    for name in ("kept", "too many"):
        log.end(name, began)
    clock.now += 5 * 10**9 + late
    assert log.begin() == (0 if late else clock.now)
    log.end("ends later", began)
    clock.now -= 1
    assert (log.begin() == 0) == late, "off for good"
    taken = log.take()
    assert (len(taken.rows), taken.dropped) == ((0, 0) if late else (1, 2))


def test_steps_that_nobody_takes_are_not_recorded(clock: Clock) -> None:
    log = SpanLog()
    log.start(limit_steps=3, limit_s=5)
    step(log, clock, 0)
    clock.now += 5 * 10**9
    step(log, clock, 1)
    assert (log._rows, log.begin()) == ([], 0)
    log.start(limit_steps=1, limit_s=5)
    clock.now += 5 * 10**9 + 1
    step(log, clock, 2)
    assert log.take().spans == [], "one that never began"


def test_a_new_recording_is_not_ended_by_the_time_of_the_one_before(clock: Clock) -> None:
    log = SpanLog()
    log.start(limit_s=5)
    clock.now += 6 * 10**9
    honest = log._expire

    def another_starts_first() -> int:
        log.start(limit_s=5)
        return honest()

    log._expire = another_starts_first  # type: ignore[method-assign]
    log.begin()
    assert log.begin() == clock.now
    log.start()
    clock.now += 10**15
    assert log.begin() == clock.now, "no limit"


def test_an_actor_offers_it(clock: Clock) -> None:
    actor = Recorded()
    actor._spans = SpanLog()
    assert actor.clock() == 1000
    actor.start_spans(1, 5)
    step(actor._spans, clock, 0)
    actor.wait_for_steps(60)
    assert len(actor.take_spans().spans) == 2
    actor.start_spans(0, 5)
    clock.now += 6 * 10**9
    assert actor._spans.begin() == 0


def test_a_span_that_is_not_recorded_costs_next_to_nothing() -> None:
    """About 30 ns on a laptop; the bound is wide, for loaded machines."""
    log, count = SpanLog(), 20_000

    def once() -> float:
        start = time.perf_counter()
        for _ in range(count):
            if began := log.begin():
                log.end("never", began, layer=1)
        return (time.perf_counter() - start) / count

    assert min(once() for _ in range(5)) < 1e-6
