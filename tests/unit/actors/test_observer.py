"""An attention shard's observer whose parts fail: times and spans are lost, no event is."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from actors import request_spans
from actors.engine.request import GenerationRequest, SamplingParams, TokenEvent
from actors.observer import ShardObserver
from actors.timeline import Instant, Timelines
from tests.span_recorder import TRACE_ID, TRACEPARENT, named
from tests.unit.engine.builders import make_scheduler

COUNT = 3


def request(name: str, trace: str = "") -> GenerationRequest:
    """One of three tokens."""
    return GenerationRequest(name, (1, 2, 3), SamplingParams(), COUNT, traceparent=trace)


class Shard:
    """As the attention shard uses it; a second a step."""

    def __init__(self) -> None:
        self.scheduler = make_scheduler()
        self.observer = ShardObserver("attention-0")
        self.told: list[TokenEvent] = []
        self._second = 0

    def now(self) -> Instant:
        self._second += 1
        return Instant(self._second * 10**9, float(self._second))

    def admit(self, request: GenerationRequest) -> None:
        self.scheduler.add(request, 0.0)
        self.observer.admit(request, self.now())

    def run(self) -> list[tuple[str, int]]:
        """To the end; returns what was told, in order."""
        while not self.scheduler.idle:
            begun = self.now()
            plan = self.scheduler.schedule(begun.clock_s)
            self.told += self.observer.note(plan.events, begun)
            span = self.observer.begin_step(plan, begun, 1)
            events = self.scheduler.update(plan, [7] * len(plan.sampled))
            self.observer.end_step(span, self.now(), events, 0.0)
            self.told += self.observer.note(events, self.now())
        return [(event.request_id, event.index) for event in self.told]


EVERYTHING = [(name, index) for index in range(COUNT) for name in ("a", "b")]


def test_events_come_back_with_their_times_and_nothing_is_left(spans: InMemorySpanExporter) -> None:
    shard = Shard()
    shard.admit(request("a", TRACEPARENT))
    shard.admit(request("b"))
    assert len(shard.observer) == 3
    assert sorted(shard.run(), key=lambda told: told[1]) == EVERYTHING
    assert [event.request_id for event in shard.told if event.prefill_s is not None] == ["a", "b"]
    assert len(named(spans, "decode")) == 1
    assert len(shard.observer) == 0


@pytest.mark.parametrize(
    ("part", "method"),
    [
        ("_timelines", "admit"),
        ("_timelines", "begin_step"),
        ("_timelines", "note"),
        ("_spans", "admit"),
        ("_spans", "begin_step"),
        ("_spans", "note"),
    ],
)
def test_a_part_that_fails_costs_no_event(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str, method: str
) -> None:
    shard = Shard()
    monkeypatch.setattr(getattr(shard.observer, part), method, Mock(side_effect=KeyError("a")))
    shard.admit(request("a", TRACEPARENT))
    shard.admit(request("b"))
    assert sorted(shard.run(), key=lambda told: told[1]) == EVERYTHING
    assert "attention shard attention-0" in caplog.text


def test_a_span_that_cannot_be_ended_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard()
    monkeypatch.setattr(request_spans.StepSpan, "end", Mock(side_effect=KeyError("a")))
    shard.admit(request("a", TRACEPARENT))
    assert shard.run() == [("a", index) for index in range(COUNT)]


def test_one_request_that_is_not_known_leaves_the_others_their_times_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    shard, honest = Shard(), Timelines._noted

    def noted(lines: Timelines, event: TokenEvent, now: Instant) -> Any:
        if event.request_id == "a":
            raise KeyError("a")
        return honest(lines, event, now)

    shard.admit(request("a"))
    shard.admit(request("b"))
    monkeypatch.setattr(Timelines, "_noted", noted)
    assert sorted(shard.run(), key=lambda told: told[1]) == EVERYTHING
    assert [event.request_id for event in shard.told if event.prefill_s is not None] == ["b"]
    assert len(shard.observer) == 1, "only the one that could not be noted"


def test_the_log_is_told_the_traces_of_a_step_each_once() -> None:
    shard = Shard()
    for name, trace in (("a", TRACEPARENT), ("b", ""), ("c", TRACEPARENT)):
        shard.admit(request(name, trace))
    plan = shard.scheduler.schedule(0.0)
    assert len(plan.chunks) == 3
    assert shard.observer.trace_ids(plan) == [f"{TRACE_ID:032x}"]
