from __future__ import annotations

import pickle

import pytest

from actors.engine.admission import DuplicateRequest, NeverFits, Pace, QueueFull, SchedulerLimits
from actors.engine.request import Priority

from .builders import FakeCache, drain, lone_run, make_request, make_scheduler


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ((1, 1, 1, 1), "context_length is 1, must be at least 2"),
        ((8, 0, 1, 1), "max_running is 0"),
        ((8, 4, 3, 1), "token_budget is 3, must be at least 4"),
        ((8, 1, 1, 0), "max_waiting is 0"),
    ],
)
def test_limits_under_which_nothing_moves_are_refused(limits: tuple[int, int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SchedulerLimits(*limits)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (make_request(prompt=0), "prompt_ids"),
        (make_request(prompt=16), "prompt_ids"),
        (make_request(prompt=10, generated_ids=(1,) * 6, max_tokens=9), "prompt_ids"),
        (make_request(max_tokens=0), "max_tokens"),
        (make_request(max_tokens=2, generated_ids=(7, 8)), "max_tokens"),
    ],
)
def test_what_never_fits_is_refused_with_its_field(request_: object, field: str) -> None:
    scheduler = make_scheduler(context_length=16)
    with pytest.raises(NeverFits, match=field) as refusal:
        scheduler.add(request_, now=0.0)  # type: ignore[arg-type]
    assert refusal.value.field == field
    assert scheduler.idle


def test_the_context_is_used_to_its_last_token() -> None:
    scheduler = make_scheduler(context_length=16)
    scheduler.add(request := make_request(prompt=15, max_tokens=99), now=0.0)
    assert drain(scheduler, FakeCache(scheduler.blocks)) == lone_run(request, 16)


def test_a_request_may_need_every_block_and_no_more() -> None:
    # 9 tokens of prompt and 4 generated put 12 into the cache: 3 blocks of 4.
    scheduler = make_scheduler(n_blocks=3)
    with pytest.raises(NeverFits, match="needs 4 KV blocks of 4 tokens, there are 3") as refusal:
        scheduler.add(make_request(prompt=9, max_tokens=5), now=0.0)
    assert refusal.value.field == "max_tokens"
    with pytest.raises(NeverFits) as refusal:
        scheduler.add(make_request(prompt=13, max_tokens=1), now=0.0)
    assert refusal.value.field == "prompt_ids"
    scheduler.add(request := make_request(prompt=9, max_tokens=4), now=0.0)
    assert drain(scheduler, FakeCache(scheduler.blocks)) == lone_run(request, 64)


def test_an_id_is_taken_until_its_end_was_handed_out() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"), now=0.0)
    with pytest.raises(DuplicateRequest, match="'a'"):
        scheduler.add(make_request("a"), now=0.0)
    assert scheduler.abort("a")
    with pytest.raises(DuplicateRequest):
        scheduler.add(make_request("a"), now=0.0)
    assert [event.request_id for event in scheduler.schedule(0.0).events] == ["a"]
    scheduler.add(make_request("a"), now=0.0)


def test_a_full_queue_refuses_and_tells_when_to_come_again() -> None:
    scheduler = make_scheduler(max_running=1, token_budget=1, max_waiting=2)
    for at in range(2):
        scheduler.add(make_request(f"{at}", prompt=1), now=0.0)
    with pytest.raises(QueueFull) as refusal:
        scheduler.add(make_request("late", prompt=1), now=0.0)
    assert refusal.value.retry_after_s == 1.0
    scheduler.schedule(10.0)
    scheduler.add(make_request("fits", prompt=1), now=10.0)
    with pytest.raises(QueueFull, match=r"2 requests are waiting, retry in 5\.00 s"):
        scheduler.add(make_request("late", prompt=1), now=15.0)


def test_a_full_queue_takes_what_was_admitted_before() -> None:
    scheduler = make_scheduler(max_running=1, token_budget=1, max_waiting=1)
    scheduler.add(make_request("first", prompt=1), now=0.0)
    replays = [make_request(f"replay-{n}", generated_ids=(6, 7), replay=True) for n in range(3)]
    for request in replays:
        scheduler.add(request, now=0.0)
    with pytest.raises(QueueFull):
        scheduler.add(make_request("late", generated_ids=(6, 7)), now=0.0)
    events = drain(scheduler, FakeCache(scheduler.blocks))
    for request in replays:
        assert [e for e in events if e.request_id == request.request_id] == lone_run(request, 64)


def test_retry_time_follows_the_starts_within_bounds() -> None:
    pace = Pace()
    for at in range(100):
        pace.started(at * 0.5)
    assert pace.retry_after_s(49.5) == pytest.approx(0.5, rel=0.05)
    assert pace.retry_after_s(1e6) == 30.0
    for _ in range(32):
        pace.started(100.0)
    assert pace.retry_after_s(100.0) == 0.05


@pytest.mark.parametrize(
    "refusal",
    [NeverFits("max_tokens", "is 0"), QueueFull(3, 0.5), QueueFull(3, 0.5, 1.5), DuplicateRequest("a")],
    ids=repr,
)
def test_refusals_survive_the_way_between_processes(refusal: Exception) -> None:
    copy = pickle.loads(pickle.dumps(refusal))  # noqa: S301
    assert str(copy) == str(refusal)
    assert vars(copy) == vars(refusal)


@pytest.mark.parametrize("share", [0.0, 0.9e-3, -1.0, float("inf"), float("nan")])
def test_a_share_is_a_finite_number_of_at_least_a_thousandth(share: float) -> None:
    with pytest.raises(NeverFits, match=r"at least 0\.001") as refusal:
        make_scheduler().add(make_request(share=share), now=0.0)
    assert refusal.value.field == "share"


@pytest.mark.parametrize(
    ("limit", "named"),
    [
        ({"max_gap": 1.0}, "max_gap is 1.0, must be 0 or a finite number above 1"),
        ({"max_gap": float("inf")}, "max_gap is inf"),
        ({"batch_patience_s": -1.0}, "batch_patience_s is -1.0"),
        ({"batch_patience_s": float("nan")}, "batch_patience_s is nan"),
    ],
)
def test_limits_that_mean_nothing_are_refused(limit: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_scheduler(**limit)  # type: ignore[arg-type]


def test_several_choices_are_admitted_all_or_none() -> None:
    scheduler = make_scheduler(max_waiting=4)
    scheduler.add(make_request("first"), now=0.0)
    for group, error in (
        ([make_request("a"), make_request("b", max_tokens=0)], NeverFits),
        ([make_request("a"), make_request("first")], DuplicateRequest),
        ([make_request("a"), make_request("a")], DuplicateRequest),
        ([make_request(name) for name in "abcd"], QueueFull),
    ):
        with pytest.raises(error):
            scheduler.add_all(group, now=0.0)
        assert scheduler.n_waiting == 1
    scheduler.add_all([make_request(name) for name in "abc"], now=0.0)
    assert scheduler.n_waiting == 4


def test_an_empty_queue_takes_more_choices_than_may_wait() -> None:
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add_all([make_request(f"{n}") for n in range(5)], now=0.0)
    assert scheduler.n_waiting == 5


def test_each_priority_has_its_own_queue() -> None:
    scheduler = make_scheduler(max_waiting=2, batch_patience_s=5.0, max_running=1, token_budget=1)
    for n in range(2):
        scheduler.add(make_request(f"batch{n}", priority=Priority.BATCH), now=0.0)
    with pytest.raises(QueueFull):
        scheduler.add(make_request("batch2", priority=Priority.BATCH), now=0.0)
    scheduler.schedule(10.0)  # they count as interactive now, and still not in the interactive queue
    for n in range(2):
        scheduler.add(make_request(f"chat{n}"), now=10.0)
    with pytest.raises(QueueFull):
        scheduler.add(make_request("chat2"), now=10.0)


def test_a_tenant_below_its_part_is_let_into_a_full_queue() -> None:
    scheduler = make_scheduler(max_waiting=6)
    for n in range(6):
        scheduler.add(make_request(f"greedy{n}", tenant="greedy"), now=0.0)
    # The parts of 6 are 2 and 4; a third tenant makes them 1, 2 and 3.
    for n in range(4):
        scheduler.add(make_request(f"b{n}", tenant="b", share=2.0), now=0.0)
    with pytest.raises(QueueFull, match=r"4 requests of this tenant are waiting, its share .* is 4\.0, retry") as own:
        scheduler.add(make_request("b4", tenant="b", share=2.0), now=0.0)
    assert own.value.tenant_limit == 4.0
    with pytest.raises(QueueFull, match="6 requests of this tenant") as greedy:
        scheduler.add(make_request("greedy6", tenant="greedy"), now=0.0)
    assert greedy.value.tenant_limit == 2.0
    scheduler.add_all([make_request(f"c{n}", tenant="c", share=3.0) for n in range(2)], now=0.0)
    with pytest.raises(QueueFull, match="12 requests are waiting") as full:
        scheduler.add(make_request("d", tenant="d"), now=0.0)
    assert full.value.tenant_limit is None
