"""When each request waited, was prefilled and decoded: by the engine's own plans, with the times handed in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.engine.scheduler import Scheduler, StepPlan
from actors.timeline import Instant, Timeline, Timelines
from tests.unit.engine.builders import make_request, make_scheduler


class Run:
    """An engine and its timelines; every call takes a second, and what is told is kept by request."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.lines = Timelines()
        self.told: dict[str, list[TokenEvent]] = {}
        self.timelines: dict[str, Timeline] = {}
        self.started: list[str] = []
        self._second = 0

    def now(self) -> Instant:
        self._second += 1
        return Instant(10**18 + self._second * 10**9, float(self._second))

    def add(self, request: GenerationRequest) -> None:
        now = self.now()
        self.scheduler.add(request, now.clock_s)
        self.lines.admit(request, now)

    def begin(self) -> StepPlan:
        now = self.now()
        plan = self.scheduler.schedule(now.clock_s)
        self.note(plan.events, now)
        self.started += [timeline.request.request_id for timeline in self.lines.begin_step(plan, now)]
        return plan

    def step(self) -> StepPlan:
        plan = self.begin()
        self.note(self.scheduler.update(plan, [7] * len(plan.sampled)))
        return plan

    def fail(self) -> None:
        plan = self.begin()
        self.note(self.scheduler.fail(plan, FinishReason.UNAVAILABLE, "no experts"))

    def to_the_end(self) -> None:
        while not self.scheduler.idle:
            self.step()

    def note(self, events: Sequence[TokenEvent], now: Instant | None = None) -> None:
        for event, timeline in self.lines.note(events, now or self.now()):
            self.told.setdefault(event.request_id, []).append(event)
            self.timelines[event.request_id] = timeline


def times(event: TokenEvent) -> tuple[float | None, float | None]:
    return event.queue_s, event.prefill_s


def test_the_first_token_carries_the_times_and_no_other_does() -> None:
    run = Run(make_scheduler(max_running=1, token_budget=4))
    run.add(make_request("a", prompt=10, max_tokens=3))  # at 1 s; three steps of prefill from 2 s on
    run.add(make_request("b", prompt=2, max_tokens=1))
    run.to_the_end()
    assert [times(event) for event in run.told["a"]] == [(2.0, 5.0), (None, None), (None, None)]
    assert run.told["a"][-1].finish is FinishReason.LENGTH
    assert run.timelines["a"].first_token == Instant(10**18 + 8 * 10**9, 8.0)
    (only,) = run.told["b"]  # admitted at 2 s; a's steps begin at 3, 5, .. 11 s, its own at 13 s
    assert times(only) == (11.0, 1.0)
    assert only.finish is FinishReason.LENGTH
    assert run.started == ["a", "b"]
    assert len(run.lines) == 0


def test_a_replay_counts_the_tokens_of_its_own_run() -> None:
    run = Run(make_scheduler())
    run.add(make_request("a", prompt=3, max_tokens=4, generated_ids=(7, 7)))
    run.to_the_end()
    assert [event.index for event in run.told["a"]] == [2, 3]
    assert times(run.told["a"][0]) == (1.0, 1.0)
    assert run.timelines["a"].tokens == 2


def test_preemptions_are_counted_and_the_wait_is_that_for_the_first_step() -> None:
    run = Run(make_scheduler(n_blocks=6, block_size=2, max_running=2, token_budget=8))
    run.add(make_request("old", prompt=4, max_tokens=8))
    run.add(make_request("young", prompt=3, max_tokens=6))
    run.to_the_end()
    assert run.scheduler.n_preempted >= 1
    assert run.timelines["young"].preemptions == run.scheduler.n_preempted
    assert run.timelines["old"].preemptions == 0
    first, *others = run.told["young"]
    assert times(first) == (1.0, 1.0)
    assert {times(event) for event in others} == {(None, None)}
    assert run.started == ["old", "young"]
    assert len(run.told["young"]) == 6


def test_an_abort_in_the_queue_leaves_nothing() -> None:
    run = Run(make_scheduler(max_running=1, token_budget=1))
    run.add(make_request("a"))
    run.add(make_request("b"))
    run.step()
    assert run.scheduler.abort("b")
    run.step()
    (end,) = run.told["b"]
    assert (end.finish, times(end)) == (FinishReason.CANCELLED, (None, None))
    assert run.timelines["b"].scheduled is None
    assert len(run.lines) == 1


def test_an_abort_in_the_prefill_knows_when_that_began() -> None:
    run = Run(make_scheduler(max_running=1, token_budget=2))
    run.add(make_request("a", prompt=9))
    plan = run.begin()
    run.scheduler.abort("a")
    run.note(run.scheduler.update(plan, []))
    assert len(run.lines) == 0
    timeline = run.timelines["a"]
    assert timeline.scheduled == Instant(10**18 + 2 * 10**9, 2.0)
    assert (timeline.first_token, timeline.tokens) == (None, 0)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_void_step_ends_its_requests_and_no_others(steps: int) -> None:
    run = Run(make_scheduler(max_running=1, token_budget=5))
    run.add(make_request("a", prompt=5))
    run.add(make_request("b", prompt=5, max_tokens=1))
    for _ in range(steps):
        run.step()
    run.fail()
    end = run.told["a"][-1]
    assert (end.token, end.finish, end.queue_s) == (None, FinishReason.UNAVAILABLE, None)
    assert run.timelines["a"].tokens == steps
    assert len(run.lines) == 1
    run.to_the_end()
    assert run.told["b"][0].queue_s is not None
    assert len(run.lines) == 0


def test_each_preemption_counts() -> None:
    run = Run(make_scheduler())
    run.add(make_request("a"))
    for _ in range(3):
        run.lines.begin_step(StepPlan((), (), ("a",)), run.now())
    run.to_the_end()
    assert run.timelines["a"].preemptions == 3
