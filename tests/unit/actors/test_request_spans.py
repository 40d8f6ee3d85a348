"""Spans of requests on an attention shard, from the engine's plans and times that are handed in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from actors.engine.request import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from actors.engine.scheduler import Scheduler, StepPlan
from actors.moe_client import traced_layers
from actors.request_spans import BETWEEN_STEPS_S, RequestSpans, StepSpan
from actors.timeline import Instant, Timelines
from tests.span_recorder import PARENT_ID, TRACEPARENT, about, named, parent_id, span_id
from tests.unit.engine.builders import make_scheduler

EPOCH_NS = 10**18
SECOND = 10**9


def request(request_id: str, prompt: int = 5, max_tokens: int = 4, trace: str = TRACEPARENT) -> GenerationRequest:
    ids = tuple(range(1, prompt + 1))
    return GenerationRequest(request_id, ids, SamplingParams(choice=3), max_tokens, traceparent=trace)


class Run:
    """An engine with timelines and spans; every call takes ``pace`` seconds."""

    def __init__(self, scheduler: Scheduler, pace: float = 1.0) -> None:
        self.scheduler = scheduler
        self.lines, self.spans = Timelines(), RequestSpans("attention-0")
        self.pace = pace
        self.steps: list[int] = []
        self._calls = self._number = 0

    def now(self) -> Instant:
        self._calls += 1
        return Instant(EPOCH_NS + int(self._calls * self.pace * SECOND), self._calls * self.pace)

    def add(self, request: GenerationRequest) -> None:
        now = self.now()
        self.scheduler.add(request, now.clock_s)
        self.lines.admit(request, now)
        self.spans.admit(request)

    def begin(self) -> tuple[StepPlan, StepSpan | None]:
        now = self.now()
        plan = self.scheduler.schedule(now.clock_s)
        self.note(plan.events, now)
        self._number += 1
        span = self.spans.begin_step(plan, self.lines.begin_step(plan, now), now, self._number)
        if span is not None:
            self.steps.append(self._number)
        return plan, span

    def step(self) -> None:
        plan, span = self.begin()
        self.end(self.scheduler.update(plan, [7] * len(plan.sampled)), span)

    def fail(self, reason: FinishReason) -> None:
        plan, span = self.begin()
        self.end(self.scheduler.fail(plan, reason, "prompt 1 2 3 failed"), span)

    def end(self, events: Sequence[TokenEvent], span: StepSpan | None) -> None:
        now = self.now()
        if span is not None:
            span.end(now, events, 0.25)
        self.note(events, now)

    def note(self, events: Sequence[TokenEvent], now: Instant) -> None:
        self.spans.note(self.lines.note(events, now), now)

    def to_the_end(self) -> None:
        while not self.scheduler.idle:
            self.step()


def phases(spans: InMemorySpanExporter) -> list[tuple[str, float, float]]:
    """(name, from, to) of what was recorded, in seconds."""
    return [
        (s.name, (s.start_time - EPOCH_NS) / SECOND, (s.end_time - EPOCH_NS) / SECOND)
        for s in spans.get_finished_spans()
    ]


def test_the_phases_follow_one_another(spans: InMemorySpanExporter) -> None:
    run = Run(make_scheduler(max_running=1, token_budget=4))
    run.add(request("a", prompt=5, max_tokens=3))  # at 1 s; prefill in steps of 2 and 4 s, tokens at 5, 7, 9 s
    run.add(request("b", trace=""))
    run.to_the_end()
    queue = ("queue", 1.0, 3.0)
    assert phases(spans) == [queue, ("prefill", 3.0, 6.0), ("step", 7.0, 8.0), ("decode", 6.0, 10.0)]
    (step,), (decode,) = named(spans, "step"), named(spans, "decode")
    assert parent_id(step) == span_id(decode)
    assert {parent_id(named(spans, name)[0]) for name in ("queue", "prefill", "decode")} == {PARENT_ID}
    assert {about(named(spans, name)[0], "choice") for name in ("queue", "prefill", "decode")} == {3}
    assert about(named(spans, "prefill")[0], "prompt_tokens") == 5
    figures = {key: about(step, key) for key in ("actor", "step", "rows", "requests", "experts_wait_s")}
    assert figures == {"actor": "attention-0", "step": 3, "rows": 1, "requests": 1, "experts_wait_s": 0.25}
    assert {key: about(decode, key) for key in ("output_tokens", "finish_reason", "preemptions")} == {
        "output_tokens": 3,
        "finish_reason": "length",
        "preemptions": 0,
    }
    assert len(run.spans) == len(run.lines) == 0


@pytest.mark.parametrize(
    ("steps", "wanted"), [(0, ["queue"]), (1, ["queue", "prefill"]), (2, ["queue", "prefill", "decode"])]
)
def test_an_aborted_request_ends_in_the_phase_it_was_in(
    spans: InMemorySpanExporter, steps: int, wanted: list[str]
) -> None:
    run = Run(make_scheduler(token_budget=8))
    run.add(request("a", prompt=12))
    for _ in range(steps):
        run.step()
    run.scheduler.abort("a")
    run.step()
    assert [span.name for span in spans.get_finished_spans()] == wanted
    last = spans.get_finished_spans()[-1]
    assert (about(last, "finish_reason"), last.status.status_code) == ("cancelled", StatusCode.UNSET)
    assert len(run.spans) == 0


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.UNAVAILABLE])
@pytest.mark.parametrize(("steps", "last"), [(0, "prefill"), (1, "decode")])
def test_a_void_step_is_an_error_of_the_phase_and_tells_no_text(
    spans: InMemorySpanExporter, steps: int, last: str, reason: FinishReason
) -> None:
    run = Run(make_scheduler())
    run.add(request("a"))
    for _ in range(steps):
        run.step()
    run.fail(reason)
    failed = [span for span in spans.get_finished_spans() if span.status.status_code is StatusCode.ERROR]
    assert [span.name for span in failed] == (["step", last] if steps else [last])
    for span in failed:
        assert (span.status.description, span.attributes["error.type"]) == (reason.value, reason.value)
        assert "prompt 1" not in span.to_json()
    assert len(run.spans) == len(run.lines) == 0


def test_a_preempted_request_tells_how_often(spans: InMemorySpanExporter) -> None:
    run = Run(make_scheduler(n_blocks=6, block_size=2, max_running=2, token_budget=8))
    run.add(request("old", prompt=4, max_tokens=8, trace=""))
    run.add(request("young", prompt=3, max_tokens=6))
    run.to_the_end()
    (decode,) = named(spans, "decode")
    assert about(decode, "preemptions") == run.scheduler.n_preempted >= 1
    assert [name for name, _, _ in phases(spans)].count("queue") == 1


def test_the_steps_of_many_requests_are_traced_once_a_second(spans: InMemorySpanExporter) -> None:
    run = Run(make_scheduler(), pace=BETWEEN_STEPS_S / 8)
    for number in range(10):
        run.add(request(f"r{number}", max_tokens=2))
        run.to_the_end()
    starts = [span.start_time for span in named(spans, "step")]
    assert 2 <= len(starts) < 10
    assert min(later - first for first, later in pairwise(starts)) >= BETWEEN_STEPS_S * SECOND
    assert len(named(spans, "decode")) == 10


def test_who_had_to_wait_for_a_step_gets_one_later(spans: InMemorySpanExporter) -> None:
    """Requests that run together: one step a second is traced, until each of them had one."""
    run = Run(make_scheduler(), pace=BETWEEN_STEPS_S / 4)
    for number in range(3):
        run.add(request(f"r{number}", max_tokens=20))
    run.to_the_end()
    decodes = {span.context.span_id for span in named(spans, "decode") if span.context is not None}
    parents = [span.parent.span_id for span in named(spans, "step") if span.parent is not None]
    assert len(parents) == 3
    assert set(parents) == decodes


def test_a_trace_that_cannot_be_read_costs_a_line_and_no_answer(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(make_scheduler())
    with caplog.at_level(logging.WARNING):
        run.add(request("a", trace="00-nonsense"))
    run.to_the_end()
    assert spans.get_finished_spans() == ()
    assert "request a is not traced: traceparent is '00-nonsense'" in caplog.text


def test_layers_that_are_shown_are_few_and_spread() -> None:
    assert traced_layers((1, 2, 5)) == {1, 2, 5}
    assert traced_layers(range(3, 19)) == set(range(3, 19))
    shown = sorted(traced_layers(range(3, 61)))
    assert (len(shown), shown[0], shown[-1]) == (16, 3, 60)
    assert {later - first for first, later in pairwise(shown)} <= {3, 4}
