"""What is not computed twice: the prefix cache, prompts that come together, and the choices of one request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.engine.request import FinishReason, GenerationRequest, Priority, TokenEvent
from actors.engine.scheduler import Scheduler

from .builders import FakeCache, drain, lone_run, make_request, make_scheduler

PROMPT = tuple(range(100, 112))  # 3 blocks of 4


class Run:
    """A scheduler and what it told, step by step."""

    def __init__(self, **settings: object) -> None:
        self.scheduler: Scheduler = make_scheduler(**settings)  # type: ignore[arg-type]
        self.cache = FakeCache(self.scheduler.blocks)
        self.events: list[TokenEvent] = []

    def add(self, *requests: GenerationRequest) -> None:
        self.scheduler.add_all(requests, 0.0)

    def step(self) -> list[tuple[str, int, int]]:
        """(request, start, tokens) of each chunk."""
        plan = self.scheduler.schedule(0.0)
        self.events += [*plan.events, *self.scheduler.update(plan, self.cache.run(plan))]
        self.scheduler.check()
        return [(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in plan.chunks]

    def ends_as_alone(self, *requests: GenerationRequest) -> None:
        self.events += drain(self.scheduler, self.cache)
        for request in requests:
            first, *others = [event for event in self.events if event.request_id == request.request_id]
            assert [replace(first, cached=0), *others] == lone_run(request, 64)

    def cached(self, name: str) -> int:
        return next(event.cached for event in self.events if event.request_id == name)


def test_a_common_beginning_is_computed_once() -> None:
    run = Run()
    run.add(first := make_request("first", PROMPT))
    run.ends_as_alone(first)
    run.add(again := make_request("again", (*PROMPT[:9], 7, 7)))
    assert run.step() == [("again", 8, 3)]
    run.ends_as_alone(again)
    assert run.cached("again") == 8
    assert (run.scheduler.prefix_queried_tokens, run.scheduler.prefix_hit_tokens) == (12 + 11, 8)


def test_the_last_token_is_computed_anew_in_a_copy_of_its_block() -> None:
    run = Run()
    run.add(first := make_request("first", PROMPT))
    run.ends_as_alone(first)
    run.add(again := make_request("again", PROMPT))
    plan = run.scheduler.schedule(0.0)
    ((source, target),) = plan.copies
    (chunk,) = plan.chunks
    assert (chunk.start, chunk.token_ids) == (11, PROMPT[11:])
    assert chunk.block_table[2] == target != source
    run.events += run.scheduler.update(plan, run.cache.run(plan))
    run.ends_as_alone(again)
    assert run.cached("again") == 11


def test_a_copy_is_left_out_where_there_is_no_block_for_it() -> None:
    run = Run(n_blocks=3)
    run.add(first := make_request("first", PROMPT, max_tokens=1))
    run.ends_as_alone(first)
    run.add(again := make_request("again", PROMPT, max_tokens=1))
    assert run.step() == [("again", 8, 4)]
    run.ends_as_alone(again)


def test_an_answer_is_found_by_the_next_question() -> None:
    run = Run()
    run.add(first := make_request("first", PROMPT, max_tokens=6))
    run.ends_as_alone(first)
    answer = tuple(event.token for event in lone_run(first, 64) if event.token is not None)
    run.add(make_request("next", (*PROMPT, *answer, 5, 5)))
    assert run.step() == [("next", 16, 4)]


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"adapter": "x"}])
def test_tenants_and_adapters_find_their_own_alone(other: dict[str, str]) -> None:
    run = Run()
    run.add(make_request("first", PROMPT))
    run.events += drain(run.scheduler, run.cache)
    run.add(make_request("other", PROMPT, **other), make_request("same", PROMPT))
    assert run.step() == [("other", 0, 12), ("same", 11, 1)]


def test_a_cache_that_is_off_finds_nothing() -> None:
    run = Run(prefix_cache=False)
    for name in ("first", "again"):
        run.add(request := make_request(name, PROMPT))
        run.ends_as_alone(request)
        assert run.cached(name) == 0
    assert run.scheduler.blocks.n_cached == 0


def test_what_led_to_no_token_is_never_found() -> None:
    run = Run()
    run.cache.bad_from = {"bad": 11}
    run.add(make_request("bad", PROMPT))
    run.step()
    assert run.events[-1].finish is FinishReason.ERROR
    assert run.scheduler.blocks.n_cached == 0
    run.add(good := make_request("good", PROMPT))
    assert run.step() == [("good", 0, 12)]
    run.ends_as_alone(good)


def test_log_probabilities_of_a_prompt_need_all_its_rows() -> None:
    run = Run(token_budget=8)
    run.add(first := make_request("first", PROMPT))
    run.ends_as_alone(first)
    run.add(request := make_request("rows", PROMPT, prompt_logprobs=3))
    targets: list[int] = []
    for start, n in ((0, 8), (8, 4)):
        plan = run.scheduler.schedule(0.0)
        (chunk,) = plan.chunks
        assert (chunk.start, len(chunk.token_ids), chunk.prompt_logprobs) == (start, n, 3)
        targets += chunk.prompt_targets
        run.events += run.scheduler.update(plan, run.cache.run(plan))
    assert tuple(targets) == PROMPT[1:]
    (chunk,) = run.scheduler.schedule(0.0).chunks
    assert (chunk.prompt_targets, chunk.prompt_logprobs) == ((), 0)
    assert run.cached(request.request_id) == 0
    assert (run.scheduler.prefix_queried_tokens, run.scheduler.prefix_hit_tokens) == (12, 0)


def test_who_needs_what_is_being_computed_lets_others_pass() -> None:
    run = Run(token_budget=8)
    run.add(first := make_request("first", PROMPT))
    run.add(second := make_request("second", (*PROMPT[:8], 1, 2)))
    run.add(other := make_request("other", 3))
    assert run.step() == [("first", 0, 8)]
    assert run.step() == [("first", 8, 4), ("other", 0, 3)]
    assert run.step() == [("first", 12, 1), ("other", 3, 1), ("second", 8, 2)]
    run.ends_as_alone(first, second, other)


@pytest.mark.parametrize("end", ["abort", "failed chunk"])
def test_a_hold_ends_with_the_one_who_was_waited_for(end: str) -> None:
    run = Run(token_budget=8)
    run.add(make_request("first", PROMPT))
    run.add(second := make_request("second", PROMPT))
    plan = run.scheduler.schedule(0.0)
    assert [chunk.request_id for chunk in plan.chunks] == ["first"]
    if end == "abort":
        run.scheduler.abort("first")
    run.scheduler.update(plan, run.cache.run(plan), {"first": "bad"} if end == "failed chunk" else None)
    assert run.step() == [("second", 0, 8)]
    run.ends_as_alone(second)


def test_an_interactive_request_does_not_wait_for_a_batch_prefill() -> None:
    run = Run(token_budget=8)
    run.add(make_request("batch", PROMPT, priority=Priority.BATCH))
    assert run.step() == [("batch", 0, 8)]
    run.add(make_request("chat", PROMPT))
    assert run.step() == [("chat", 0, 8)]


def test_a_hold_outlasts_a_batch_prefill_that_an_interactive_one_overtook() -> None:
    run = Run(token_budget=8, max_running=3)
    run.add(make_request("batch", PROMPT, priority=Priority.BATCH))
    run.step()
    run.add(chat := make_request("chat", PROMPT))
    assert run.step() == [("chat", 0, 8)]
    run.scheduler.abort("batch")
    run.add(third := make_request("third", PROMPT))
    assert run.step() == [("chat", 8, 4)]
    run.ends_as_alone(chat, third)
    assert run.cached("third") == 11


def test_a_hold_ends_when_the_block_is_there_though_others_compute_it_too() -> None:
    """Evaluations that overlap without end compute all rows of a prompt whose beginning has long been in the cache."""
    run = Run(token_budget=10)
    run.add(make_request("eval0", PROMPT, max_tokens=1, prompt_logprobs=0))
    assert run.step() == [("eval0", 0, 10)]
    run.add(late := make_request("late", PROMPT[:6], max_tokens=2))
    run.add(make_request("eval1", PROMPT, max_tokens=1, prompt_logprobs=0))
    assert run.step() == [("eval0", 10, 2), ("eval1", 0, 8)]
    assert run.step() == [("eval1", 8, 4), ("late", 4, 2)]
    run.ends_as_alone(late)


def choices(n: int, prompt: tuple[int, ...] = PROMPT, **fields: object) -> list[GenerationRequest]:
    first = make_request("c0", prompt, **fields)  # type: ignore[arg-type]
    return [first, *(replace(first, request_id=f"c{i}", leader="c0") for i in range(1, n))]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("n_tokens", [9, 10, 12, 13])
def test_choices_fork_from_the_first(prefix_cache: bool, n_tokens: int) -> None:
    run = Run(prefix_cache=prefix_cache)
    prompt = tuple(range(n_tokens))
    run.add(*(requests := choices(3, prompt)))
    assert run.step() == [("c0", 0, n_tokens)]
    assert run.step() == [("c0", n_tokens, 1), ("c1", n_tokens - 1, 1), ("c2", n_tokens - 1, 1)]
    run.ends_as_alone(*requests)
    assert run.cached("c2") == 0
    assert run.scheduler.prefix_queried_tokens == (n_tokens if prefix_cache else 0)
    assert run.scheduler.prefix_hit_tokens == 0


def test_choices_tell_what_the_first_found_in_the_cache() -> None:
    run = Run()
    run.add(first := make_request("first", PROMPT[:8], max_tokens=1))
    run.ends_as_alone(first)
    run.add(*(requests := choices(3)))
    run.ends_as_alone(*requests)
    assert [run.cached(request.request_id) for request in requests] == [8, 8, 8]
    assert (run.scheduler.prefix_queried_tokens, run.scheduler.prefix_hit_tokens) == (8 + 12, 8)


def test_what_a_choice_finds_of_its_own_after_a_preemption_is_not_told() -> None:
    run = Run()
    first, follower = choices(2, max_tokens=6)
    run.add(first)
    run.step()
    run.scheduler._lineup._preempt(run.scheduler._lineup.running[0])
    assert run.step() == [("c0", 12, 1)]
    run.add(follower)
    run.ends_as_alone(first, follower)
    assert (run.cached("c0"), run.cached("c1")) == (0, 0)


def test_a_replay_tells_what_it_found_of_its_prompt_alone() -> None:
    run = Run()
    run.add(first := make_request("first", PROMPT, max_tokens=9))
    run.ends_as_alone(first)
    answer = tuple(event.token for event in lone_run(first, 64) if event.token is not None)
    run.add(make_request("again", PROMPT, max_tokens=20, generated_ids=answer))
    assert run.step() == [("again", 20, 1)]
    assert run.cached("again") == 12
    assert run.scheduler.prefix_hit_tokens == 20


def test_a_fork_late_in_the_answer_takes_no_token_of_it() -> None:
    run = Run(max_running=2, prefix_cache=False)
    leader, follower = choices(2, tuple(range(6)), max_tokens=9)
    run.add(leader, blocker := make_request("other", 3, max_tokens=5), follower)
    for _ in range(5):
        run.step()
    assert run.step() == [("c0", 10, 1), ("c1", 5, 1)]
    run.ends_as_alone(leader, follower, blocker)


@pytest.mark.parametrize("fate", ["ended", "unknown", "another prompt", "another tenant", "batch", "circle"])
def test_without_a_leader_a_choice_is_an_ordinary_request(fate: str) -> None:
    run = Run(prefix_cache=False)
    leader, follower = choices(2)
    if fate == "another prompt":
        leader = replace(leader, prompt_ids=PROMPT[:-1])
    if fate == "another tenant":
        leader = replace(leader, tenant="b")
    if fate == "batch":
        leader = replace(leader, priority=Priority.BATCH)
    if fate == "circle":
        leader = replace(leader, leader="c1")
    run.add(*((follower,) if fate == "unknown" else (leader, follower)))
    if fate == "ended":
        run.scheduler.abort("c0")
    start = None
    while start is None:
        start = next((start for name, start, _ in run.step() if name == "c1"), None)
    assert start == (11 if fate == "circle" else 0)
    run.ends_as_alone(*((follower,) if fate in ("ended", "unknown") else (leader, follower)))


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("n_tokens", [3, 12, 13])
def test_choices_of_one_token_share_the_prompt_of_one_that_has_ended(prefix_cache: bool, n_tokens: int) -> None:
    run = Run(prefix_cache=prefix_cache)
    run.add(*(requests := choices(4, tuple(range(n_tokens)), max_tokens=1)))
    assert run.step() == [("c0", 0, n_tokens)]
    assert run.step() == [(f"c{i}", n_tokens - 1, 1) for i in (1, 2, 3)]
    run.ends_as_alone(*requests)
    assert run.scheduler.blocks.n_free == run.scheduler.blocks.n_blocks


def test_choices_without_a_place_share_the_prompt_when_they_have_one() -> None:
    run = Run(prefix_cache=False, max_running=2)
    run.add(*(requests := choices(5, max_tokens=3)))
    pieces = []
    while not run.scheduler.idle:
        pieces += run.step()
    assert [piece for piece in pieces if piece[2] > 1] == [("c0", 0, 12)]
    assert len(run.scheduler._pace._starts) == 5
    assert {name: start for name, start, _ in reversed(pieces)} == {"c0": 0} | {f"c{i}": 11 for i in range(1, 5)}
    run.ends_as_alone(*requests)


def test_a_choice_that_fills_the_memory_takes_over_no_block_that_it_would_have_to_copy() -> None:
    run = Run(n_blocks=5)
    run.add(*(requests := choices(2, tuple(range(18)), max_tokens=3)))
    for _ in range(4):
        run.step()
    assert run.step() == [("c1", 16, 2)]
    run.ends_as_alone(*requests)


def test_choices_of_a_prompt_of_one_token_need_nothing_of_each_other() -> None:
    run = Run(prefix_cache=False, max_running=2)
    run.add(*(requests := choices(3, (5,), max_tokens=2)))
    assert run.step() == [("c0", 0, 1), ("c1", 0, 1)]
    run.ends_as_alone(*requests)


def test_the_next_choice_computes_the_prompt_when_the_first_is_gone_before_it_has() -> None:
    run = Run(prefix_cache=False, token_budget=8)
    run.add(*(requests := choices(3)))
    assert run.step() == [("c0", 0, 8)]
    run.scheduler.abort("c0")
    run.scheduler.check()
    assert run.step() == [("c1", 0, 8)]
    assert run.step() == [("c1", 8, 4)]
    assert run.step() == [("c1", 12, 1), ("c2", 11, 1)]
    run.ends_as_alone(*requests[1:])


def test_a_choice_takes_the_place_of_one_that_is_cancelled_while_it_is_computed() -> None:
    run = Run(prefix_cache=False, max_running=1, n_blocks=5)
    run.add(*(requests := choices(2, max_tokens=6)))
    run.add(other := make_request("other", 3))
    for _ in range(3):
        run.step()
    plan = run.scheduler.schedule(0.0)
    run.scheduler.abort("c0")
    run.scheduler.check()
    assert run.scheduler.n_running == 1
    run.events += run.scheduler.update(plan, run.cache.run(plan))
    assert run.step() == [("c1", 11, 1)]
    run.ends_as_alone(requests[1], other)
    assert run.scheduler.blocks.n_free == 5


@pytest.mark.parametrize("why", ["another has the prompt", "no prompt to share", "rows wanted"])
def test_a_choice_that_need_not_have_the_place_of_another_waits_for_its_turn(why: str) -> None:
    """A tenant that was not served yet comes before it."""
    run = Run(prefix_cache=False, max_running=2 if why == "another has the prompt" else 1)
    fields = {"prompt_logprobs": 0} if why == "rows wanted" else {}
    prompt = (5,) if why == "no prompt to share" else PROMPT
    first, *others = choices(3, prompt, max_tokens=9, tenant="a", **fields)
    run.add(first, *others[: run.scheduler.limits.max_running - 1])
    run.step()
    run.step()
    run.add(other := make_request("other", 3, tenant="b"), *others[run.scheduler.limits.max_running - 1 :])
    run.scheduler.abort("c0")
    assert ("other", 0, 3) in run.step()
    run.ends_as_alone(other, *others)


def preempted_choices(**settings: object) -> tuple[Run, list[GenerationRequest]]:
    """Two choices, of which the first had drawn 6 tokens when it lost its place, which is free again."""
    run = Run(prefix_cache=False, max_running=2, token_budget=8, **settings)
    requests = choices(2, max_tokens=9, priority=Priority.BATCH)
    run.add(requests[0], make_request("other", 1, max_tokens=30, priority=Priority.BATCH), requests[1])
    while sum(event.request_id == "c0" for event in run.events) < 6:
        run.step()
    run.add(make_request("chat0", 3, max_tokens=1), make_request("chat1", 3, max_tokens=1))
    assert run.step() == [("chat0", 0, 3), ("chat1", 0, 3)]
    run.scheduler.abort("other")
    return run, requests


def test_a_choice_waits_for_the_first_that_computes_the_prompt_again() -> None:
    run, requests = preempted_choices()
    assert [run.step() for _ in range(3)] == [[("c0", 0, 8)], [("c0", 8, 8)], [("c0", 16, 2)]]
    assert run.step() == [("c0", 18, 1), ("c1", 11, 1)]
    run.ends_as_alone(*requests)


def test_nobody_forks_from_a_prompt_that_was_computed_again_and_led_to_no_token() -> None:
    run, (_, follower) = preempted_choices()
    run.cache.bad_from = {"c0": 5}
    assert [run.step() for _ in range(3)] == [[("c0", 0, 8)], [("c0", 8, 8)], [("c0", 16, 2)]]
    assert run.events[-1].finish is FinishReason.ERROR
    assert run.step() == [("c1", 0, 8)]
    run.ends_as_alone(follower)


def test_a_preempted_choice_forks_from_any_that_has_the_prompt() -> None:
    run = Run(prefix_cache=False)
    run.add(*(requests := choices(3, max_tokens=8)))
    for _ in range(3):
        run.step()
    run.scheduler._lineup._preempt(run.scheduler._lineup.running[0])
    assert run.step() == [("c1", 13, 1), ("c2", 13, 1), ("c0", 11, 4)]
    run.ends_as_alone(*requests)


def test_a_preempted_request_finds_what_is_left_of_its_blocks() -> None:
    run = Run(n_blocks=5, max_running=2)
    old, young = make_request("old", 3, max_tokens=13), make_request("young", 9, max_tokens=5)
    run.add(old, young)
    pieces = []
    while not run.scheduler.idle:
        pieces += [piece for piece in run.step() if piece[0] == "young"]
    assert run.scheduler.n_preempted == 1
    assert pieces[-1] == ("young", 4, 9)
    run.ends_as_alone(old, young)
    assert run.cached("young") == 0
