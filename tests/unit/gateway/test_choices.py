"""Requests for several answers: admitted together, each replayed alone, ended together. Virtual time, fake shards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.engine.request import FinishReason, Priority
from actors.refusals import Refusal
from cluster.access import Caller
from cluster.fleet import ActorUnreachable
from cluster.gateway.arrivals import Arrivals
from cluster.gateway.errors import Conflict, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from cluster.gateway.group import StreamGroup
from cluster.gateway.streams import Streams
from tests.unit.gateway.fake_shards import FakeShard, request, run, settle, unavailable

LENGTH, DOWN, CANCELLED = FinishReason.LENGTH, FinishReason.UNAVAILABLE, FinishReason.CANCELLED
CALLER = Caller("acme", "user", 2.5)
Tokens = dict[int, list[int | None]]


class Place:
    """A gateway's streams with some shards; ``read`` does as a call."""

    def __init__(self) -> None:
        self.streams = Streams("gateway-0", 60.0)

    async def shard(self, name: str) -> FakeShard:
        shard = FakeShard(self.streams, name)
        await self.streams.add_peer(shard.peer)
        return shard

    async def open(self, n: int = 3, timeout_s: float | None = None, **fields: Any) -> StreamGroup:
        return await self.streams.open(request(n=n, **fields), timeout_s, CALLER)

    async def read(self, group: StreamGroup) -> tuple[Tokens, dict[int, FinishReason | None]]:
        """Tokens and ends of all choices."""
        tokens: Tokens = {choice: [] for choice in range(len(group.streams))}
        ends: dict[int, FinishReason | None] = {}
        try:
            async with Arrivals(self.streams, group) as arrivals:
                while len(ends) < len(group.streams):
                    choice, events = await arrivals.next()
                    tokens[choice] += [event.token for event in events if event.token is not None]
                    if events[-1].finish is not None:
                        ends[choice] = events[-1].finish
        finally:
            self.streams.close(group)
        return tokens, ends


def in_virtual_time(test: Callable[[Place], Awaitable[None]]) -> Callable[[], None]:
    """Make a pytest function of a coroutine that is given a fresh Place; nothing may be left of any stream."""

    def wrapped() -> None:
        async def whole() -> None:
            place = Place()
            await test(place)
            assert (len(place.streams), len(place.streams._by_client), len(place.streams._runs)) == (0, 0, 0)

        run(whole())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


@in_virtual_time
async def test_all_choices_are_one_submission_led_by_the_first(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    group = await place.open(priority=Priority.BATCH, prompt_logprobs=3)
    assert (a.submissions, b.submissions) == ([3], [])
    first, *others = a.jobs
    assert [job.sampling.choice for job in a.jobs] == [0, 1, 2]
    assert [job.leader for job in a.jobs] == ["", first.request_id, first.request_id]
    assert len({job.request_id for job in a.jobs}) == 3
    assert [job.prompt_logprobs for job in a.jobs] == [3, None, None], "whoever asks computes the whole prompt"
    assert {(job.tenant, job.share, job.priority, job.replay) for job in a.jobs} == {("acme", 2.5, 1, False)}
    assert len(others) == 2
    a.give(10, 11, job=1, finish=LENGTH)
    a.give(20, job=0, finish=LENGTH)
    a.give(30, job=2, finish=FinishReason.STOP)
    ends = {0: LENGTH, 1: LENGTH, 2: FinishReason.STOP}
    assert await place.read(group) == ({0: [20], 1: [10, 11], 2: [30]}, ends)
    assert a.aborted == []
    assert len(place.streams) == 0


@in_virtual_time
async def test_a_single_answer_has_no_leader(place: Place) -> None:
    a = await place.shard("a")
    group = await place.open(1, prompt_logprobs=0)
    assert [(job.leader, job.prompt_logprobs, job.sampling.choice) for job in a.jobs] == [("", 0, 0)]
    place.streams.close(group)


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (Refusal(Refusal.FULL, "full", retry_after_s=2.0), Overloaded),
        (Refusal(Refusal.INVALID, "max_tokens: too many", field="max_tokens"), InvalidRequest),
    ],
)
def test_a_refusal_is_that_of_all(refusal: Refusal, error: type[Exception]) -> None:
    @in_virtual_time
    async def check(place: Place) -> None:
        a, b = await place.shard("a"), await place.shard("b")
        a.answers = [refusal]
        with pytest.raises(error):
            await place.open()
        assert (a.submissions, b.submissions, a.aborted) == ([3], [], [])

    check()


@in_virtual_time
async def test_who_is_not_there_is_passed_over_with_all_choices(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    a.answers = [unavailable()]
    group = await place.open()
    assert (a.submissions, b.submissions) == ([3], [3])
    assert [job.leader for job in b.jobs] == ["", b.jobs[0].request_id, b.jobs[0].request_id]
    assert not any(job.replay for job in b.jobs)
    place.streams.close(group)
    await settle()
    assert b.aborted == [job.request_id for job in b.jobs]


@in_virtual_time
async def test_an_admission_in_doubt_counts(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    a.answers = [FakeShard.HANG]
    opening = asyncio.create_task(place.open())
    await settle()
    place.streams.lose_peer("a")
    group = await opening
    assert (b.submissions, [job.replay for job in b.jobs]) == ([1, 1, 1], [True] * 3)
    place.streams.close(group)
    a.pending[0].set_exception(ActorUnreachable("dead"))
    await settle()


@in_virtual_time
async def test_a_choice_that_ends_before_the_admission_is_answered(place: Place) -> None:
    a = await place.shard("a")
    a.answers = [FakeShard.HANG]
    opening = asyncio.create_task(place.open(2))
    await settle()
    a.give(10, job=0, finish=LENGTH)
    await settle()
    assert not opening.done(), "the other may still be refused"
    a.pending[0].set_result(None)
    group = await opening
    a.give(20, job=1, finish=LENGTH)
    assert await place.read(group) == ({0: [10], 1: [20]}, {0: LENGTH, 1: LENGTH})


@in_virtual_time
async def test_each_choice_goes_on_elsewhere_alone(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    group = await place.open(prompt_logprobs=1)
    a.give(10, job=0)
    a.give(20, 21, job=1)
    reading = asyncio.create_task(place.read(group))
    await settle()
    place.streams.lose_peer("a")
    await settle()
    assert b.submissions == [1, 1, 1]
    assert [job.generated_ids for job in b.jobs] == [(10,), (20, 21), ()]
    assert [(job.sampling.choice, job.leader, job.replay) for job in b.jobs] == [(n, "", True) for n in range(3)]
    assert [job.prompt_logprobs for job in b.jobs] == [None] * 3, "they came with the first token"
    for job in range(3):
        b.give(30 + job, job=job, finish=LENGTH)
    tokens, _ = await reading
    assert tokens == {0: [10, 30], 1: [20, 21, 31], 2: [32]}
    assert place.streams.replays == 3


@in_virtual_time
async def test_the_prompts_log_probabilities_are_asked_for_until_a_token_comes(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    group = await place.open(prompt_logprobs=1)
    reading = asyncio.create_task(place.read(group))
    await settle()
    a.send(a.jobs[0].request_id, 0, finish=DOWN)
    await settle()
    assert [(job.sampling.choice, job.prompt_logprobs, job.replay) for job in b.jobs] == [(0, 1, True)]
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


@in_virtual_time
async def test_a_choice_that_looks_for_a_shard_does_not_hold_up_the_others(place: Place) -> None:
    a = await place.shard("a")
    group = await place.open(2)
    async with Arrivals(place.streams, group) as arrivals:
        a.answers = [unavailable()] * 1000
        a.send(a.jobs[0].request_id, 0, finish=DOWN)
        await asyncio.sleep(5.0)
        a.give(20, job=1)
        choice, (event,) = await arrivals.next()
        assert (choice, event.token) == (1, 20)
        with pytest.raises(Unavailable):
            await arrivals.next()
    place.streams.close(group)
    assert asyncio.get_running_loop().time() == pytest.approx(60.0, abs=2)
    assert a.jobs[1].request_id in a.aborted


@in_virtual_time
async def test_the_deadline_is_that_of_all(place: Place) -> None:
    a = await place.shard("a")
    group = await place.open(2, timeout_s=4.0)
    assert [job.timeout_s for job in a.jobs] == [4.0, 4.0]
    place.streams.lose_peer("a")
    with pytest.raises(DeadlineExceeded):
        await place.read(group)


@in_virtual_time
async def test_a_choice_that_is_stopped_leaves_the_others(place: Place) -> None:
    a = await place.shard("a")
    group = await place.open()
    async with Arrivals(place.streams, group) as arrivals:
        a.give(10, job=1)
        await arrivals.next()
        arrivals.stop(1)
        assert a.aborted == [a.jobs[1].request_id]
        a.give(11, job=1)
        a.give(20, job=2)
        choice, (event,) = await arrivals.next()
        assert (choice, event.token) == (2, 20)
    place.streams.close(group)
    assert sorted(a.aborted) == sorted(job.request_id for job in a.jobs)


@in_virtual_time
async def test_abort_ends_all_that_have_not_ended(place: Place) -> None:
    a = await place.shard("a")
    group = await place.open()
    assert place.streams.find("r", "acme") is group
    a.give(10, job=1, finish=LENGTH)
    place.streams.abort(group)
    assert await place.read(group) == ({0: [], 1: [10], 2: []}, {0: CANCELLED, 1: LENGTH, 2: CANCELLED})
    assert a.aborted == [a.jobs[0].request_id, a.jobs[2].request_id]


@in_virtual_time
async def test_whoever_comes_back_takes_the_place_of_all(place: Place) -> None:
    a = await place.shard("a")
    earlier = await place.open(2)
    with pytest.raises(Conflict):
        await place.open(3)
    with pytest.raises(Conflict):
        await place.open(2, prompt_logprobs=0)
    again = await place.open(2)
    tokens, ends = await place.read(earlier)
    assert (tokens, ends) == ({0: [], 1: []}, {0: CANCELLED, 1: CANCELLED})
    assert a.submissions == [2, 2]
    a.give(10, job=2, finish=LENGTH)
    a.give(20, job=3, finish=LENGTH)
    assert (await place.read(again))[0] == {0: [10], 1: [20]}


@in_virtual_time
async def test_a_client_may_go_while_all_wait(place: Place) -> None:
    a = await place.shard("a")
    group = await place.open()
    place.streams.lose_peer("a")
    reading = asyncio.create_task(place.read(group))
    await asyncio.sleep(3.0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    b = await place.shard("b")
    await settle()
    assert (a.aborted, b.jobs) == ([], [])


@in_virtual_time
async def test_what_a_drain_leaves_ends_with_unavailable(place: Place) -> None:
    a = await place.shard("a")
    group = await place.open()
    a.give(10, job=0, finish=LENGTH)
    reading = asyncio.create_task(place.read(group))
    await settle()
    await place.streams.drain(5.0)
    with pytest.raises(Unavailable):
        await reading
    assert a.aborted == [job.request_id for job in a.jobs[1:]]


@in_virtual_time
async def test_who_watches_is_told_whose_each_event_is(place: Place) -> None:
    a = await place.shard("a")
    seen: list[tuple[int, int | None]] = []
    group = await place.open(2)
    watch = group.streams[0].watch
    for stream in group.streams:
        stream.watch = type(watch)("", lambda event, choice: seen.append((choice, event.token)))
    a.give(20, job=1, finish=LENGTH)
    a.give(10, job=0, finish=LENGTH)
    assert seen == [(1, 20), (0, 10)]
    await place.read(group)
