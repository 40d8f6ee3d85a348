"""Whose turn it is: classes, tenants, patience, and who gives way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from actors.engine.plan import StepPlan
from actors.engine.request import FinishReason, Priority, SamplingParams, TokenEvent
from actors.engine.scheduler import Scheduler

from .builders import FakeCache, drain, lone_run, make_request, make_scheduler

SHARES = {"one": 1.0, "two": 2.0, "four": 4.0}


def step(scheduler: Scheduler, cache: FakeCache, now: float = 0.0, elapsed_s: float | None = None) -> list[str]:
    plan = scheduler.schedule(now)
    scheduler.update(plan, cache.run(plan), elapsed_s=elapsed_s, progress=cache.progress)
    scheduler.check()
    return [chunk.request_id for chunk in plan.chunks]


@pytest.mark.parametrize("max_running", [1, 6])
def test_tenants_are_served_by_their_shares(max_running: int) -> None:
    """While all of them wait, virtual tokens differ by no more than twice what fits into the running requests."""
    scheduler = make_scheduler(max_running=max_running, token_budget=16, max_waiting=200)
    cache = FakeCache(scheduler.blocks)
    served: Counter[str] = Counter()
    tenant_of: dict[str, str] = {}
    most = 0.0
    for n in range(6000):
        for tenant, share in SHARES.items():
            while sum(s.request.tenant == tenant for s in scheduler._lineup.waiting) < 4:
                name = f"{tenant}{len(tenant_of)}"
                tenant_of[name] = tenant
                length, answer = len(tenant_of) % 7 + 1, len(tenant_of) % 5 + 2
                scheduler.add(make_request(name, length, answer, tenant=tenant, share=share), now=float(n))
        plan = scheduler.schedule(float(n))
        for chunk in plan.chunks:
            served[tenant_of[chunk.request_id]] += len(chunk.token_ids) if chunk.start == 0 else 0
        for event in scheduler.update(plan, cache.run(plan)):
            served[tenant_of[event.request_id]] += 1
        virtual = [served[tenant] / share for tenant, share in SHARES.items()]
        most = max(most, max(virtual) - min(virtual))
    assert most <= 2 * max_running * (7 + 6)
    per_share = [served[tenant] / share for tenant, share in SHARES.items()]
    assert max(per_share) < 1.05 * min(per_share)


def test_a_tenant_that_was_idle_has_saved_nothing() -> None:
    scheduler = make_scheduler(max_running=1)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("early", 1, 1, tenant="b"), 0.0)
    drain(scheduler, cache)
    for n in range(20):
        scheduler.add(make_request(f"a{n}", 5, 1, tenant="a"), 0.0)
    for _ in range(5):
        step(scheduler, cache)
    for n in range(8):
        scheduler.add(make_request(f"b{n}", 5, 1, tenant="b"), 0.0)
    order = [step(scheduler, cache)[0][0] for _ in range(8)]
    assert abs(order.count("a") - order.count("b")) <= 1


def test_cached_tokens_cost_their_tenant_nothing() -> None:
    scheduler = make_scheduler(max_running=1)
    cache = FakeCache(scheduler.blocks)
    prompt = tuple(range(12))
    for n in range(8):
        scheduler.add(make_request(f"a{n}", prompt, 1, tenant="a"), 0.0)
        scheduler.add(make_request(f"b{n}", 13, 1, tenant="b"), 0.0)
    order = [step(scheduler, cache)[0][0] for _ in range(10)]
    # The first of "a" costs 13, the others 2.
    assert order.count("a") >= 7


def test_what_is_computed_again_costs_nothing() -> None:
    scheduler = make_scheduler(n_blocks=6, max_running=3, prefix_cache=False)
    scheduler.add(make_request("old", 3, 20, tenant="a"), 0.0)
    scheduler.add(make_request("young", 2, 20, tenant="b"), 0.0)
    drain(scheduler, FakeCache(scheduler.blocks))
    assert scheduler.n_preempted == 1
    counters = scheduler._lineup.waiting._lines[Priority.INTERACTIVE].counters
    assert (counters["a"], counters["b"]) == (23.0, 22.0)


def test_batch_gives_way_to_interactive_and_goes_on_after_it() -> None:
    scheduler = make_scheduler(max_running=2)
    cache = FakeCache(scheduler.blocks)
    batch = [make_request(f"batch{n}", 3, 6, priority=Priority.BATCH) for n in range(3)]
    chat = make_request("chat", 3, 3)
    for request in batch:
        scheduler.add(request, 0.0)
    assert step(scheduler, cache) == ["batch0", "batch1"]
    scheduler.add(chat, 0.0)
    assert step(scheduler, cache) == ["chat", "batch0"]
    assert scheduler.n_preempted == 1
    events = drain(scheduler, cache)
    ends = [event.request_id for event in events if event.finish]
    assert ends == ["chat", "batch0", "batch1", "batch2"]


def test_a_preempted_request_goes_on_before_another_tenant_begins() -> None:
    scheduler = make_scheduler(max_running=1)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("greedy", 9, 6, tenant="a", priority=Priority.BATCH), 0.0)
    scheduler.add(make_request("modest", 1, 1, tenant="b", priority=Priority.BATCH), 0.0)
    assert step(scheduler, cache) == ["greedy"]
    scheduler.add(make_request("chat", 1, 1), 0.0)
    ends = [event.request_id for event in drain(scheduler, cache) if event.finish]
    assert ends == ["chat", "greedy", "modest"]


def test_interactive_takes_blocks_from_batch_but_not_in_vain() -> None:
    scheduler = make_scheduler(n_blocks=8, max_running=4, token_budget=32)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("chat", 12, 8), 0.0)
    scheduler.add(make_request("batch", 8, 8, priority=Priority.BATCH), 0.0)
    assert step(scheduler, cache) == ["chat", "batch"]
    scheduler.add(make_request("big", 20, 4), 0.0)
    assert step(scheduler, cache) == ["chat", "batch"]
    scheduler.abort("big")
    scheduler.add(make_request("small", 12, 4), 0.0)
    assert step(scheduler, cache) == ["chat", "small"]
    drain(scheduler, cache)


@pytest.mark.parametrize(("n_prompt", "preempted"), [(28, ("batch-2", "batch-1")), (29, ())])
def test_blocks_that_several_of_a_lower_class_hold_come_free_once(n_prompt: int, preempted: tuple[str, ...]) -> None:
    """Of 12 blocks the chat holds 4, the choices share 2 and have 3 of their own: 8 are free if both go."""
    scheduler = make_scheduler(n_blocks=12, max_running=4, token_budget=32)
    cache = FakeCache(scheduler.blocks)
    leader = make_request("batch-1", 12, 9, priority=Priority.BATCH)
    scheduler.add(make_request("chat", 13, 3), 0.0)
    scheduler.add_all((leader, replace(leader, request_id="batch-2", leader="batch-1")), 0.0)
    step(scheduler, cache)
    step(scheduler, cache)
    assert scheduler.blocks.n_free == 3
    scheduler.add(make_request("big", n_prompt, 2), 0.0)
    assert scheduler.schedule(0.0).preempted == preempted


@pytest.mark.parametrize(("n_prompt", "preempted"), [(28, ("batch",)), (32, ())])
def test_blocks_that_a_chat_holds_too_do_not_come_free(n_prompt: int, preempted: tuple[str, ...]) -> None:
    """The chat and the batch request share 3 blocks of 12 and have 1 each of their own."""
    scheduler = make_scheduler(n_blocks=12, max_running=4, token_budget=32)
    cache = FakeCache(scheduler.blocks)
    prompt = tuple(range(13))
    scheduler.add(make_request("chat", prompt, 3), 0.0)
    scheduler.add(make_request("batch", prompt, 3, priority=Priority.BATCH), 0.0)
    step(scheduler, cache)
    step(scheduler, cache)
    assert scheduler.blocks.n_free == 7
    scheduler.add(make_request("big", n_prompt, 2), 0.0)
    assert scheduler.schedule(0.0).preempted == preempted


def test_blocks_that_the_newcomer_finds_do_not_come_free_for_it() -> None:
    scheduler = make_scheduler(n_blocks=9, max_running=4, token_budget=32)
    cache = FakeCache(scheduler.blocks)
    prompt = tuple(range(16))
    scheduler.add(make_request("chat", 11, 3), 0.0)
    scheduler.add(make_request("batch", prompt, 9, priority=Priority.BATCH), 0.0)
    step(scheduler, cache)
    step(scheduler, cache)
    assert scheduler.blocks.n_free == 1
    scheduler.add(make_request("big", (*prompt, *range(90, 98)), 2), 0.0)
    assert scheduler.schedule(0.0).preempted == ()


def test_a_batch_prefill_leaves_the_budget_to_interactive_prompts() -> None:
    scheduler = make_scheduler(token_budget=8)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("batch", 30, priority=Priority.BATCH), 0.0)
    assert step(scheduler, cache) == ["batch"]
    scheduler.add(make_request("chat", 5), 0.0)
    assert step(scheduler, cache) == ["chat", "batch"]


@pytest.mark.parametrize("patience_s", [10.0, 30.0])
def test_batch_has_waited_enough_after_its_patience(patience_s: float) -> None:
    """Interactive requests keep coming; after its patience the batch one waits only for those that are there."""
    scheduler = make_scheduler(max_running=1, batch_patience_s=patience_s)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("batch", 5, 5, priority=Priority.BATCH), 0.0)
    started = None
    for n in range(60):
        if scheduler.n_waiting < 3:
            scheduler.add(make_request(f"chat{n}", 5, 5), float(n))
        if "batch" in step(scheduler, cache, float(n)) and started is None:
            started = n
    assert started is not None
    assert patience_s <= started <= patience_s + 4 * 5
    assert scheduler.n_preempted == 0


def test_batch_requests_take_turns_with_the_chats_that_wait() -> None:
    """There is one place, and three chats always wait for it: those go first, also before one that was preempted."""
    scheduler = make_scheduler(max_running=1, batch_patience_s=10.0)
    cache = FakeCache(scheduler.blocks)
    for name in ("batch0", "batch1"):
        scheduler.add(make_request(name, 5, 5, priority=Priority.BATCH), 0.0)
    ends: list[str] = []
    for n in range(70):
        if n in (1, 2, 3) or (n > 3 and n % 5 == 1):
            scheduler.add(make_request(f"chat{n}", 5, 5), float(n))
        plan = scheduler.schedule(float(n))
        ends += [event.request_id for event in scheduler.update(plan, cache.run(plan)) if event.finish]
    assert scheduler.n_preempted == 1
    assert " ".join(ends[:10]) == "chat1 chat2 chat3 chat6 batch0 chat11 chat16 chat21 batch1 chat26"


def test_a_backlog_of_batch_takes_one_place_after_its_patience() -> None:
    """There is a place too few for all: the chats have the others, and start as soon as they come."""
    scheduler = make_scheduler(max_running=4, max_waiting=100, batch_patience_s=2.0)
    cache = FakeCache(scheduler.blocks)
    for n in range(60):
        scheduler.add(make_request(f"batch{n}", 2, 6, priority=Priority.BATCH), 0.0)
    began: dict[str, int] = {}
    came: dict[str, int] = {}
    places: Counter[str] = Counter()
    for n in range(80):
        if n >= 2 and n % 4:
            scheduler.add(make_request(f"chat{n}", 3, 4), float(n))
            came[f"chat{n}"] = n
        for name in step(scheduler, cache, float(n)):
            began.setdefault(name, n)
            places[name[:4]] += n >= 8
    assert {name: began[name] for name in came} == came
    assert places == {"chat": 3 * 72, "batc": 72}


def test_long_batch_prompts_leave_each_chat_its_turn() -> None:
    """Prompts that fill every step follow each other; a chat waits for the one before it, not for the backlog."""
    scheduler = make_scheduler(max_running=2, token_budget=8, max_waiting=100, batch_patience_s=2.0)
    cache = FakeCache(scheduler.blocks)
    for n in range(40):
        scheduler.add(make_request(f"batch{n}", 24, 1, priority=Priority.BATCH), 0.0)
    began: dict[str, int] = {}
    came: dict[str, int] = {}
    for n in range(60):
        if n % 10 == 5:
            scheduler.add(make_request(f"chat{n}", 4, 2), float(n))
            came[f"chat{n}"] = n
        for name in step(scheduler, cache, float(n)):
            began.setdefault(name, n)
    assert all(began[name] - n <= 3 for name, n in came.items())
    assert sum(name.startswith("batch") for name in began) > 15


def test_a_batch_request_after_its_patience_is_no_stream_to_be_kept_smooth() -> None:
    scheduler = make_scheduler(n_blocks=400, context_length=1000, token_budget=128, batch_patience_s=0.0)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("old", 5, 400, priority=Priority.BATCH), 0.0)
    for _ in range(5):
        step(scheduler, cache, elapsed_s=1.0)
    scheduler.add(make_request("long", 500, priority=Priority.BATCH), 0.0)
    plan = scheduler.schedule(0.0)
    assert [len(chunk.token_ids) for chunk in plan.chunks] == [1, 127]


def test_patience_ends_while_running_too() -> None:
    scheduler = make_scheduler(max_running=1, batch_patience_s=3.0)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("batch", 5, 9, priority=Priority.BATCH), 0.0)
    step(scheduler, cache, 0.0)
    step(scheduler, cache, 3.0)
    scheduler.add(make_request("chat", 5, 9), 3.0)
    assert step(scheduler, cache, 3.0) == ["batch"]


def test_no_one_is_overtaken_for_want_of_blocks() -> None:
    scheduler = make_scheduler(n_blocks=6, max_running=4)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("a", 8, 4), 0.0)
    step(scheduler, cache)
    scheduler.add(make_request("big", 16, 2), 0.0)
    scheduler.add(make_request("small", 2, 2), 0.0)
    scheduler.add(make_request("batch", 2, 2, priority=Priority.BATCH), 0.0)
    assert step(scheduler, cache) == ["a"]
    ends = [event.request_id for event in drain(scheduler, cache) if event.finish]
    assert ends.index("a") < ends.index("big")
    assert scheduler.idle
    assert ends[-1] != "big"


def test_a_deadline_that_has_passed_is_told_at_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("late", timeout_s=0.0, generated_ids=(1, 2)), now=5.0)
    assert scheduler.n_waiting == 0
    plan = scheduler.schedule(4.0)
    assert plan.chunks == ()
    assert plan.events == (TokenEvent("late", 2, None, FinishReason.DEADLINE),)


def test_a_prefill_beside_a_stream_follows_the_times_of_steps() -> None:
    def pieces(priority: Priority) -> list[int]:
        scheduler = make_scheduler(n_blocks=400, context_length=1000, token_budget=128)
        cache = FakeCache(scheduler.blocks)
        scheduler.add(make_request("stream", 5, 400, priority=priority), 0.0)
        told = []
        for n in range(60):
            if n == 20:
                scheduler.add(make_request("long", 500, priority=Priority.BATCH), 0.0)
            plan = scheduler.schedule(0.0)
            told += [len(chunk.token_ids) for chunk in plan.all_chunks if chunk.request_id == "long"]
            tokens, rows = cache.run(plan), sum(len(chunk.token_ids) for chunk in plan.all_chunks)
            scheduler.update(plan, tokens, elapsed_s=0.020 + 0.001 * (rows - 1), progress=cache.progress)
        return [n for n in told if n > 1]

    paced = pieces(Priority.INTERACTIVE)
    assert paced[:2] == [8, 24]
    assert max(paced) == 24  # 1.2 * 20 ms at 1 ms a token
    assert max(pieces(Priority.BATCH)) == 127


def test_a_prompt_that_is_long_by_the_cache_begins_small_beside_a_stream() -> None:
    scheduler = make_scheduler(n_blocks=2000, context_length=4000, token_budget=256)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("first", prompt := tuple(range(2000)), 1), 0.0)
    drain(scheduler, cache)
    scheduler.add(make_request("stream", 5, 400), 0.0)
    for _ in range(5):
        step(scheduler, cache, elapsed_s=1.0)
    scheduler.add(make_request("short", 200, 1), 0.0)
    while scheduler.n_running + scheduler.n_waiting > 1:
        step(scheduler, cache, elapsed_s=1.2)
    scheduler.add(make_request("long", (*prompt, *range(100)), 1), 0.0)
    (piece,) = scheduler.schedule(0.0).pieces
    assert [(chunk.start, len(chunk.token_ids)) for chunk in piece.chunks] == [(2000, 8)]


def slowly(scheduler: Scheduler, cache: FakeCache, finished: int, elapsed_s: float = 2.0) -> StepPlan:
    """A step that finishes so many pieces."""
    plan = scheduler.schedule(0.0)
    tokens = cache.run_chunks(plan)
    scheduler.update(plan, tokens, elapsed_s=elapsed_s, progress=cache.advance(plan, finished))
    scheduler.check()
    return plan


@pytest.fixture
def beside_a_stream() -> tuple[Scheduler, FakeCache]:
    """Prefills go into pieces, of eight rows, since none was measured."""
    scheduler = make_scheduler(n_blocks=400, context_length=1000, token_budget=128, layers=30)
    cache = FakeCache(scheduler.blocks)
    scheduler.add(make_request("stream", 5, 400), 0.0)
    for _ in range(5):
        step(scheduler, cache, elapsed_s=1.0)
    return scheduler, cache


def rows(plan: StepPlan) -> list[list[tuple[str, int, int]]]:
    """(request, start, tokens) of each piece's chunks."""
    return [[(c.request_id, c.start, len(c.token_ids)) for c in piece.chunks] for piece in plan.pieces]


def test_a_piece_is_the_same_until_it_is_finished_and_the_next_one_is_at_hand(
    beside_a_stream: tuple[Scheduler, FakeCache],
) -> None:
    scheduler, cache = beside_a_stream
    scheduler.add(make_request("long", 40), 0.0)
    first = slowly(scheduler, cache, 0)
    assert rows(first) == [[("long", 0, 8)]]
    second = slowly(scheduler, cache, 0)
    assert rows(second) == [[("long", 0, 8)], [("long", 8, 18)]]
    assert rows(slowly(scheduler, cache, 1)) == rows(second)
    third = slowly(scheduler, cache, 2)
    assert rows(third) == [[("long", 8, 18)], [("long", 26, 14)]]
    assert first.pieces[0].number == second.pieces[0].number != second.pieces[1].number == third.pieces[0].number
    assert [chunk.request_id for chunk in scheduler.schedule(0.0).chunks] == ["stream", "long"]


def test_who_ends_leaves_its_piece_to_the_others(beside_a_stream: tuple[Scheduler, FakeCache]) -> None:
    scheduler, cache = beside_a_stream
    for name in ("a", "b", "c"):
        scheduler.add(make_request(name, 4), 0.0)
    assert rows(slowly(scheduler, cache, 0)) == [[("a", 0, 4), ("b", 0, 4)]]
    scheduler.abort("a")
    after = slowly(scheduler, cache, 0)
    assert rows(after) == [[("b", 0, 4)], [("c", 0, 4)]]
    scheduler.add(make_request("a", 4), 0.0)  # another one, of the same name
    scheduler.abort("b")
    last = slowly(scheduler, cache, 0)
    assert rows(last) == [[("c", 0, 4)], [("a", 0, 4)]]
    assert last.pieces[0].number == after.pieces[1].number


def test_pieces_are_computed_to_their_end_where_nobody_streams_any_more(
    beside_a_stream: tuple[Scheduler, FakeCache],
) -> None:
    scheduler, cache = beside_a_stream
    scheduler.add(request := make_request("long", 40, 3), 0.0)
    slowly(scheduler, cache, 0)
    scheduler.abort("stream")
    plan = scheduler.schedule(0.0)
    assert (plan.chunks, plan.pace, rows(plan)) == ((), None, [[("long", 0, 8)]])
    with pytest.raises(ValueError, match=r"progress\.finished"):
        scheduler.update(plan, [])
    scheduler.update(plan, cache.run(plan), progress=cache.progress)
    assert [event.token for event in drain(scheduler, cache)] == [event.token for event in lone_run(request, 1000)]


def test_a_failed_step_ends_those_in_pieces_too(beside_a_stream: tuple[Scheduler, FakeCache]) -> None:
    scheduler, cache = beside_a_stream
    scheduler.add(make_request("long", 40), 0.0)
    slowly(scheduler, cache, 0)
    plan = scheduler.schedule(0.0)
    ends = scheduler.fail(plan, FinishReason.UNAVAILABLE, "no expert")
    assert {event.request_id for event in ends} == {"stream", "long"}
    assert len(ends) == 2
    assert scheduler.idle


def test_a_prompt_that_is_found_whole_is_a_row_among_the_streams(beside_a_stream: tuple[Scheduler, FakeCache]) -> None:
    scheduler, cache = beside_a_stream
    prompt = tuple(range(500, 509))
    scheduler.add(make_request("first", prompt, 1), 0.0)
    while scheduler.n_running + scheduler.n_waiting > 1:
        step(scheduler, cache, elapsed_s=2.0)
    scheduler.add(make_request("again", prompt, 1), 0.0)
    plan = scheduler.schedule(0.0)
    assert [(chunk.request_id, chunk.start) for chunk in plan.chunks][1:] == [("again", 8)]
    assert plan.pieces == ()


@pytest.mark.parametrize(
    ("penalty", "prompt_ids"), [({"presence_penalty": 0.5}, []), ({"repetition_penalty": 1.5}, [2, 7])], ids=str
)
def test_penalties_see_what_they_look_at_and_stop_ids_wait_for_min_tokens(
    penalty: dict[str, float], prompt_ids: list[int]
) -> None:
    """Two tokens came on a shard that was lost. Draws are looked at when all are made: later steps leave them alone."""
    scheduler = make_scheduler()
    cache = FakeCache(scheduler.blocks)
    sampling, stop_ids = SamplingParams(min_tokens=4, **penalty), frozenset({98})  # type: ignore[arg-type]
    request = make_request("p", (7, 2, 7), 5, sampling, stop_ids=stop_ids, generated_ids=(9, 9))
    scheduler.add(request, 0.0)
    answer = [9, 9, *(event.token for event in lone_run(request, 64))]
    plans = []
    for _ in range(3):
        plans.append(scheduler.schedule(0.0))
        scheduler.update(plans[-1], cache.run(plans[-1]))
    for index, draw in enumerate((plan.chunks[0].draw for plan in plans), start=2):
        assert draw is not None
        assert (draw.sampling, draw.index) == (sampling, index)
        assert draw.held_back == (stop_ids if index < 4 else frozenset())
        assert (list(draw.prompt_ids), list(draw.generated_ids)) == (prompt_ids, answer[:index])
