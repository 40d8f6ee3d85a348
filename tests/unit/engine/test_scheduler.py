from __future__ import annotations

import pytest

from actors.engine.pacing import GapBound
from actors.engine.plan import Pace, StepPlan
from actors.engine.request import Draw, FinishReason, SamplingParams, TokenEvent
from actors.engine.scheduler import Scheduler

from .builders import FakeCache, drain, lone_run, make_request, make_scheduler, next_token


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    """(request, start, tokens, sample) of each chunk."""
    return [(chunk.request_id, chunk.start, len(chunk.token_ids), chunk.draw is not None) for chunk in plan.all_chunks]


def step(scheduler: Scheduler, cache: FakeCache) -> tuple[list[tuple[str, int, int, bool]], list[TokenEvent]]:
    plan = scheduler.schedule(0.0)
    assert plan.chunks or not scheduler.n_running
    events = [*plan.events, *scheduler.update(plan, cache.run(plan), progress=cache.progress)]
    scheduler.check()
    return shape(plan), events


@pytest.fixture
def scheduler() -> Scheduler:
    return make_scheduler()


@pytest.fixture
def cache(scheduler: Scheduler) -> FakeCache:
    return FakeCache(scheduler.blocks)


def test_one_request_runs_as_it_would_alone(scheduler: Scheduler, cache: FakeCache) -> None:
    scheduler.add(request := make_request(prompt=6, max_tokens=7), now=0.0)
    assert drain(scheduler, cache) == lone_run(request, 64)
    assert scheduler.blocks.n_free == scheduler.blocks.n_blocks


def test_a_chunk_says_what_to_compute_and_where(scheduler: Scheduler) -> None:
    scheduler.add(request := make_request(prompt=(9, 8, 7, 6, 5)), now=0.0)
    (chunk,) = scheduler.schedule(0.0).chunks
    assert chunk.token_ids == (9, 8, 7, 6, 5)
    assert chunk.start == 0
    first, second = chunk.block_table
    assert chunk.slots == (4 * first, 4 * first + 1, 4 * first + 2, 4 * first + 3, 4 * second)
    assert chunk.draw == Draw(request.sampling, 0)


def test_prefill_is_cut_to_the_budget_beside_decodes(cache: FakeCache, scheduler: Scheduler) -> None:
    scheduler.add(make_request("a", prompt=3, max_tokens=9), now=0.0)
    assert step(scheduler, cache)[0] == [("a", 0, 3, True)]
    scheduler.add(make_request("b", prompt=20, max_tokens=9), now=0.0)
    scheduler.add(make_request("c", prompt=9, max_tokens=9), now=0.0)
    assert step(scheduler, cache)[0] == [("a", 3, 1, True), ("b", 0, 15, False)]
    assert step(scheduler, cache)[0] == [("a", 4, 1, True), ("b", 15, 5, True), ("c", 0, 9, True)]
    assert step(scheduler, cache)[0] == [("a", 5, 1, True), ("b", 20, 1, True), ("c", 9, 1, True)]


def test_requests_join_at_any_step_up_to_max_running() -> None:
    scheduler = make_scheduler(max_running=2)
    cache = FakeCache(scheduler.blocks)
    for name in "abc":
        scheduler.add(make_request(name, prompt=1, max_tokens=2), now=0.0)
    assert [name for name, *_ in step(scheduler, cache)[0]] == ["a", "b"]
    assert (scheduler.n_running, scheduler.n_waiting) == (2, 1)
    assert [name for name, *_ in step(scheduler, cache)[0]] == ["a", "b"]
    assert [name for name, *_ in step(scheduler, cache)[0]] == ["c"]


def test_a_stop_id_is_published_and_ends(scheduler: Scheduler, cache: FakeCache) -> None:
    prompt = (3, 1, 4)
    stop = next_token((*prompt, next_token(prompt)))
    scheduler.add(make_request(prompt=prompt, max_tokens=2, stop_ids=frozenset({stop})), now=0.0)
    assert drain(scheduler, cache) == [
        TokenEvent("r", 0, next_token(prompt)),
        TokenEvent("r", 1, stop, FinishReason.STOP),
    ]


@pytest.mark.parametrize("when", ["waiting", "running", "in step", "after step"])
def test_abort_frees_at_once_and_ends_once(scheduler: Scheduler, cache: FakeCache, when: str) -> None:
    scheduler.add(make_request("keep"), now=0.0)
    scheduler.add(make_request("gone"), now=0.0)
    events: list[TokenEvent] = []
    if when == "running":
        events += step(scheduler, cache)[1]
    if when in ("in step", "after step"):
        plan = scheduler.schedule(0.0)
        tokens = cache.run(plan)
        if when == "after step":
            events += scheduler.update(plan, tokens)
    assert scheduler.abort("gone")
    assert not scheduler.abort("gone")
    scheduler.check()
    assert scheduler.blocks.n_blocks - scheduler.blocks.n_free == (0 if when == "waiting" else 2)
    if when == "in step":
        events += scheduler.update(plan, tokens)
    events += drain(scheduler, cache)
    gone = [event for event in events if event.request_id == "gone"]
    n_tokens = 1 if when in ("running", "after step") else 0
    assert [event.finish for event in gone] == [None] * n_tokens + [FinishReason.CANCELLED]
    assert (gone[-1].token, gone[-1].index) == (None, n_tokens)
    assert [e for e in events if e.request_id == "keep"] == lone_run(make_request("keep"), 64)


def test_an_aborted_request_alone_is_told_by_a_step_without_chunks(scheduler: Scheduler) -> None:
    scheduler.add(make_request(), now=0.0)
    assert scheduler.abort("r", FinishReason.UNAVAILABLE, "draining")
    assert not scheduler.idle
    plan = scheduler.schedule(0.0)
    assert plan.chunks == ()
    assert plan.events == (TokenEvent("r", 0, None, FinishReason.UNAVAILABLE, "draining"),)
    assert scheduler.update(plan, []) == []
    assert scheduler.idle


def test_a_deadline_ends_waiting_and_running_requests(cache: FakeCache) -> None:
    scheduler = make_scheduler(max_running=1)
    scheduler.add(make_request("running", timeout_s=2.0), now=10.0)
    scheduler.add(make_request("waiting", timeout_s=1.0), now=11.0)
    plan = scheduler.schedule(11.9)
    assert plan.events == ()
    scheduler.update(plan, cache.run(plan))
    plan = scheduler.schedule(12.0)
    assert plan.chunks == ()
    assert plan.events == (
        TokenEvent("running", 1, None, FinishReason.DEADLINE),
        TokenEvent("waiting", 0, None, FinishReason.DEADLINE),
    )
    assert scheduler.blocks.n_free == scheduler.blocks.n_blocks


def test_the_youngest_is_preempted_and_goes_on_where_it_was() -> None:
    scheduler = make_scheduler(n_blocks=6, max_running=3)
    cache = FakeCache(scheduler.blocks)
    requests = [
        make_request("old", prompt=3, max_tokens=20),
        make_request("young", prompt=(5, 5), max_tokens=20),
    ]
    for request in requests:
        scheduler.add(request, now=0.0)
    events = drain(scheduler, cache)
    assert scheduler.n_preempted == 1
    for request in requests:
        told = [event for event in events if event.request_id == request.request_id]
        assert told == lone_run(request, 64)


def test_preemption_keeps_the_order_of_arrival() -> None:
    scheduler = make_scheduler(n_blocks=5, max_running=4)
    cache = FakeCache(scheduler.blocks)
    for name in "abc":
        scheduler.add(make_request(name, prompt=1, max_tokens=17), now=0.0)
    events = drain(scheduler, cache)
    assert scheduler.n_preempted >= 2
    assert [event.request_id for event in events if event.finish] == ["a", "b", "c"]


def test_the_youngest_waits_for_blocks_with_its_cache_kept() -> None:
    scheduler = make_scheduler(n_blocks=5, max_running=2)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("old", prompt=8, max_tokens=4), now=0.0)
    scheduler.add(make_request("young", prompt=7, max_tokens=8), now=0.0)
    shapes = []
    while scheduler.n_running or scheduler.n_waiting:
        shapes.append(step(scheduler, cache)[0])
    # 8 + 7 tokens take 4 blocks, the fifth goes to "old"; "young" has no slot for position 8 until "old" ends.
    assert shapes[:5] == [
        [("old", 0, 8, True), ("young", 0, 7, True)],
        [("old", 8, 1, True), ("young", 7, 1, True)],
        [("old", 9, 1, True)],
        [("old", 10, 1, True)],
        [("young", 8, 1, True)],
    ]
    assert scheduler.n_preempted == 0


def test_a_newcomer_leaves_a_block_to_each_running_request() -> None:
    scheduler = make_scheduler(n_blocks=5, max_running=2)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("a", prompt=4, max_tokens=5), now=0.0)
    scheduler.add(make_request("b", prompt=16, max_tokens=2), now=0.0)
    assert step(scheduler, cache)[0] == [("a", 0, 4, True)]
    assert [name for name, *_ in step(scheduler, cache)[0]] == ["a"]


class NoPrefills(GapBound):
    """Lets prompts begin beside the first decode, and leaves them out of every step after it."""

    _begun = False
    _looked = 0

    def pace(self, n_decodes: int) -> Pace | None:
        begun, self._begun = self._begun, True
        return Pace(0.0 if begun else 2.0, 1.0)

    def rows(self, pace: Pace, context: int) -> int:
        """So that each of two prefills gets four: a prefill looks twice."""
        self._looked += 1
        return 4 if self._looked <= 2 else 8


def test_a_step_never_leaves_out_all_that_run() -> None:
    """The decode behind a prefill that is left out has no block for its next token: the prefill moves after all."""
    scheduler = make_scheduler(n_blocks=8)
    scheduler._gap_bound = NoPrefills(2.2)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("stream", prompt=1, max_tokens=2), now=0.0)
    step(scheduler, cache)
    requests = [make_request("long", prompt=24, max_tokens=4), make_request("short", prompt=4, max_tokens=26)]
    for request in requests:
        scheduler.add(request, now=0.0)
    shapes, events = step(scheduler, cache)
    assert shapes == [("stream", 1, 1, True), ("long", 0, 4, False), ("short", 0, 4, True)]
    while scheduler.blocks.n_free or shapes != [("short", 27, 1, True)]:
        shapes, told = step(scheduler, cache)
        events += told
    assert step(scheduler, cache)[0] == [("long", 4, 15, False)]
    events += drain(scheduler, cache)
    for request in requests:
        told = [event for event in events if event.request_id == request.request_id]
        assert told == lone_run(request, 64)


def test_one_failed_chunk_ends_its_request_alone(scheduler: Scheduler, cache: FakeCache) -> None:
    for name in ("a", "b", "c"):
        scheduler.add(make_request(name), now=0.0)
    plan = scheduler.schedule(0.0)
    tokens: list[int | None] = [*cache.run(plan)]
    tokens[1] = None
    events = scheduler.update(plan, tokens, failures={"c": "rows are not finite"})
    scheduler.check()
    assert events[0] == TokenEvent("a", 0, tokens[0])
    assert events[1].finish is FinishReason.ERROR
    assert "index 0" in events[1].message
    assert events[2] == TokenEvent("c", 0, None, FinishReason.ERROR, "rows are not finite")
    assert {event.request_id for event in drain(scheduler, cache)} == {"a"}


def test_a_prefill_chunk_can_fail_without_a_token(scheduler: Scheduler, cache: FakeCache) -> None:
    scheduler.add(make_request(prompt=20), now=0.0)
    plan = scheduler.schedule(0.0)
    assert plan.sampled == ()
    assert scheduler.update(plan, [], {"r": "bad"}) == [TokenEvent("r", 0, None, FinishReason.ERROR, "bad")]
    assert scheduler.idle


def test_a_failed_step_ends_its_requests_and_no_others(cache: FakeCache) -> None:
    scheduler = make_scheduler(max_running=2)
    for name in ("a", "b", "other"):
        scheduler.add(make_request(name), now=0.0)
    plan = scheduler.schedule(0.0)
    scheduler.abort("a")
    assert scheduler.fail(plan, FinishReason.UNAVAILABLE, "expert 3 of layer 1 has no home") == [
        TokenEvent("a", 0, None, FinishReason.CANCELLED),
        TokenEvent("b", 0, None, FinishReason.UNAVAILABLE, "expert 3 of layer 1 has no home"),
    ]
    assert drain(scheduler, cache) == lone_run(make_request("other"), 64)


def test_a_replayed_request_goes_on_at_the_next_index(scheduler: Scheduler, cache: FakeCache) -> None:
    whole = lone_run(make_request(max_tokens=6), 64)
    done = tuple(event.token for event in whole[:4] if event.token is not None)
    scheduler.add(make_request(max_tokens=6, generated_ids=done), now=0.0)
    assert scheduler.schedule(0.0).chunks[0].draw == Draw(SamplingParams(), 4)
    scheduler = make_scheduler()
    scheduler.add(make_request(max_tokens=6, generated_ids=done), now=0.0)
    assert drain(scheduler, cache) == whole[4:]


def test_steps_are_resolved_once_and_in_turn(scheduler: Scheduler, cache: FakeCache) -> None:
    scheduler.add(make_request(), now=0.0)
    plan = scheduler.schedule(0.0)
    with pytest.raises(RuntimeError, match="has not been resolved"):
        scheduler.schedule(0.0)
    with pytest.raises(ValueError, match="tokens has 2 entries, the plan samples 1"):
        scheduler.update(plan, [1, 2])
    with pytest.raises(ValueError, match="failures names \\['x'\\]"):
        scheduler.update(plan, [1], {"x": "?"})
    scheduler.update(plan, [1])
    with pytest.raises(RuntimeError, match="was resolved"):
        scheduler.update(plan, [1])
    with pytest.raises(RuntimeError, match="was resolved"):
        scheduler.fail(plan, FinishReason.ERROR, "late")


def test_an_aborted_id_may_be_used_again_after_its_step(scheduler: Scheduler, cache: FakeCache) -> None:
    scheduler.add(make_request("a"), now=0.0)
    scheduler.add(make_request("b"), now=0.0)
    plan = scheduler.schedule(0.0)
    scheduler.abort("a")
    scheduler.update(plan, cache.run(plan))
    scheduler.add(again := make_request("a", prompt=(4, 2)), now=0.0)
    told = [event for event in drain(scheduler, cache) if event.request_id == "a"]
    assert told == lone_run(again, 64)
