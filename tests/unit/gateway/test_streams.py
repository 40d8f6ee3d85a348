"""Streams that outlive their attention shards: replay, waiting, giving up, retiring. Virtual time, fake shards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from actors.engine.request import FinishReason, TokenEvent
from actors.refusals import Refusal
from cluster.access import EVERYBODY, Caller
from cluster.fleet import ActorUnreachable
from cluster.gateway.errors import Conflict, DeadlineExceeded, Internal, InvalidRequest, Overloaded, Unavailable
from cluster.gateway.group import StreamGroup
from cluster.gateway.peers import OnlyShard
from cluster.gateway.stream import Watch
from cluster.gateway.streams import Streams
from tests.span_recorder import PARENT_ID, TRACE_ID, TRACEPARENT
from tests.unit.gateway.fake_shards import FakeShard, request, run, settle, unavailable

RECOVERY_S = 60.0
LENGTH, STOP, DOWN = FinishReason.LENGTH, FinishReason.STOP, FinishReason.UNAVAILABLE


class Place:
    """A gateway's streams with some shards, of requests for one answer; ``tokens`` reads as a call does."""

    def __init__(self) -> None:
        self.streams = Streams("gateway-0", RECOVERY_S)

    async def shard(self, name: str) -> FakeShard:
        shard = FakeShard(self.streams, name)
        await self.streams.add_peer(shard.peer)
        return shard

    async def open(self, tenant: str = "", timeout_s: float | None = None, **fields: object) -> StreamGroup:
        caller = Caller(tenant, "user", 1.0)
        return await self.streams.open(request(**fields), timeout_s, caller)  # type: ignore[arg-type]

    async def news(self, group: StreamGroup) -> list[TokenEvent]:
        """What comes next."""
        (stream,) = group.streams
        return await self.streams.next_events(stream)

    async def rest(self, stream: StreamGroup) -> list[TokenEvent]:
        """Every event up to the end."""
        events: list[TokenEvent] = []
        while not events or events[-1].finish is None:
            events += await self.news(stream)
        self.streams.close(stream)
        return events

    async def tokens(self, stream: StreamGroup) -> tuple[list[int | None], FinishReason | None]:
        events = await self.rest(stream)
        return [event.token for event in events if event.token is not None], events[-1].finish

    def left(self) -> tuple[int, int, int]:
        """What is still kept of any stream."""
        return len(self.streams), len(self.streams._by_client), len(self.streams._runs)


def in_virtual_time(test: Callable[[Place], Awaitable[None]]) -> Callable[[], None]:
    """Make a pytest function of a coroutine that is given a fresh Place; nothing may be left of any stream."""

    def wrapped() -> None:
        async def whole() -> None:
            place = Place()
            await test(place)
            assert place.left() == (0, 0, 0)

        run(whole())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


@in_virtual_time
async def test_an_undisturbed_stream_is_submitted_once(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open(timeout_s=9.0)
    a.give(10, 11, finish=LENGTH)
    assert await place.tokens(stream) == ([10, 11], LENGTH)
    (job,) = a.jobs
    assert (job.generated_ids, job.replay, job.timeout_s, job.gateway) == ((), False, 9.0, "gateway-0")
    assert (a.aborted, place.streams.replays) == ([], 0)


@in_virtual_time
async def test_a_slow_reader_gets_what_came_together_bit_by_bit_and_whole(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open(max_tokens=500)
    a.give(*range(200, 400), finish=LENGTH)
    assert len(await place.news(stream)) == 64
    assert await place.tokens(stream) == ([*range(264, 400)], LENGTH)


@in_virtual_time
async def test_a_lost_shard_is_replaced_by_another_at_once(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open(timeout_s=9.0)
    a.give(10, 11)
    reading = asyncio.create_task(place.rest(stream))
    await asyncio.sleep(2.0)
    place.streams.lose_peer("a")
    await settle()
    (job,) = b.jobs
    assert (job.prompt_ids, job.generated_ids, job.replay) == ((1, 2, 3), (10, 11), True)
    assert (job.sampling.seed, job.max_tokens, job.timeout_s) == (5, 8, 7.0)
    assert job.request_id != a.jobs[0].request_id
    b.give(12, 13, finish=LENGTH)
    events = await reading
    assert [(event.index, event.token) for event in events] == [(0, 10), (1, 11), (2, 12), (3, 13)]
    assert (place.streams.replays, a.aborted, b.aborted, asyncio.get_running_loop().time()) == (1, [], [], 2.0)


@in_virtual_time
async def test_tokens_that_the_call_has_not_read_yet_are_in_the_replay(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open()
    a.give(10, 11, 12)
    place.streams.lose_peer("a")
    assert [event.token for event in await place.news(stream)] == [10, 11, 12]
    reading = asyncio.create_task(place.tokens(stream))
    await settle()
    b.give(13, finish=LENGTH)
    assert await reading == ([13], LENGTH)
    assert b.jobs[0].generated_ids == (10, 11, 12)


@in_virtual_time
async def test_without_any_shard_a_stream_waits_for_the_next_one(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open()
    a.give(10)
    place.streams.lose_peer("a")
    reading = asyncio.create_task(place.tokens(stream))
    await asyncio.sleep(RECOVERY_S - 1)
    assert not reading.done()
    b = await place.shard("b")
    await settle()
    b.give(11, finish=STOP)
    assert await reading == ([10, 11], STOP)
    assert b.times == [RECOVERY_S - 1]


@in_virtual_time
async def test_a_stream_may_lose_shard_after_shard(place: Place) -> None:
    shards = [await place.shard(name) for name in "abc"]
    stream = await place.open()
    reading = asyncio.create_task(place.tokens(stream))
    for number, shard in enumerate(shards[:2]):
        shard.give(number)
        place.streams.lose_peer(shard.name)
        await settle()
    shards[2].give(2, finish=LENGTH)
    assert await reading == ([0, 1, 2], LENGTH)
    assert [shard.jobs[0].generated_ids for shard in shards] == [(), (0,), (0, 1)]
    assert place.streams.replays == 2


@in_virtual_time
async def test_a_shard_that_cannot_be_reached_may_have_taken_the_stream(place: Place) -> None:
    """So it is a replay from then on, which nobody refuses for want of room."""
    a, b = await place.shard("a"), await place.shard("b")
    a.answers = [ActorUnreachable("a: killed")]
    stream = await place.open()
    assert (b.jobs[0].replay, b.jobs[0].generated_ids) == (True, ())
    b.give(10, finish=LENGTH)
    assert await place.tokens(stream) == ([10], LENGTH)


@in_virtual_time
async def test_the_wire_tells_of_a_death_before_the_submission_does(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    a.answers = [FakeShard.HANG]
    opening = asyncio.create_task(place.open())
    await settle()
    place.streams.lose_peer("a")
    stream = await opening
    b.give(10, finish=LENGTH)
    assert await place.tokens(stream) == ([10], LENGTH)
    a.pending[0].set_exception(ActorUnreachable("a: killed, 14 s ago"))
    await settle()


@in_virtual_time
async def test_in_doubt_and_alone_the_call_waits(place: Place) -> None:
    a = await place.shard("a")
    a.answers = [ActorUnreachable("a: killed")] * 3
    opening = asyncio.create_task(place.open())
    await settle()
    place.streams.lose_peer("a")
    await asyncio.sleep(5.0)
    b = await place.shard("b")
    stream = await opening
    b.give(10, finish=LENGTH)
    assert await place.tokens(stream) == ([10], LENGTH)


@in_virtual_time
async def test_in_doubt_a_bad_request_is_still_told_as_such(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    a.answers = [ActorUnreachable("a: killed")]
    b.answers = [Refusal(Refusal.INVALID, "max_tokens: too many", field="max_tokens")]
    with pytest.raises(InvalidRequest, match="max_tokens"):
        await place.open()


@in_virtual_time
async def test_the_first_refusal_is_for_the_client(place: Place) -> None:
    with pytest.raises(Unavailable):
        await place.open()
    a, b = await place.shard("a"), await place.shard("b")
    a.answers = [unavailable(), Refusal(Refusal.FULL, "", retry_after_s=3.0), unavailable(2.0), unavailable(2.0)]
    stream = await place.open()  # b takes it
    b.give(1, finish=LENGTH)
    await place.tokens(stream)
    b.answers = [Refusal(Refusal.FULL, "", retry_after_s=3.0)]
    with pytest.raises(Overloaded) as full:
        await place.open()
    assert full.value.retry_after_s == 3.0
    place.streams.lose_peer("b")
    a.answers = [unavailable(2.0)]
    with pytest.raises(Unavailable) as down:
        await place.open()
    assert down.value.retry_after_s == 2.0


@in_virtual_time
async def test_unavailable_goes_to_another_shard_at_once(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open()
    a.give(10)
    a.send(a.jobs[0].request_id, 1, finish=DOWN, message="expert-1 is gone")
    reading = asyncio.create_task(place.tokens(stream))
    await settle()
    assert b.jobs[0].generated_ids == (10,)
    b.give(11, finish=LENGTH)
    assert await reading == ([10, 11], LENGTH)


@in_virtual_time
async def test_alone_a_shard_is_tried_again_with_growing_pauses(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open()
    a.send(a.jobs[0].request_id, 0, finish=DOWN)
    a.answers = [unavailable()] * 7
    assert not place.streams.ready
    reading = asyncio.create_task(place.tokens(stream))
    await asyncio.sleep(5.0)
    pauses = [later - earlier for earlier, later in zip(a.times, a.times[1:], strict=False)]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])
    assert place.streams.replays == 1
    a.give(10)
    assert place.streams.ready
    a.send(a.jobs[-1].request_id, 1, finish=DOWN)
    await asyncio.sleep(0.06)
    assert (a.jobs[-1].generated_ids, len(a.jobs)) == ((10,), 10)  # a token makes the pauses short again
    a.give(11, finish=LENGTH)
    assert await reading == ([10, 11], LENGTH)


@in_virtual_time
async def test_shards_that_failed_take_turns(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open()
    a.answers, b.answers = [unavailable()] * 100, [unavailable()] * 2
    a.send(a.jobs[0].request_id, 0, finish=DOWN)
    reading = asyncio.create_task(place.tokens(stream))
    await asyncio.sleep(2.0)
    assert (a.times, b.times) == (pytest.approx([0, 0.05, 0.35]), pytest.approx([0, 0.15, 0.75]))
    b.give(10, finish=LENGTH)
    assert await reading == ([10], LENGTH)


@in_virtual_time
async def test_a_new_shard_ends_a_pause(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open()
    a.send(a.jobs[0].request_id, 0, finish=DOWN)
    a.answers = [unavailable()] * 100
    reading = asyncio.create_task(place.tokens(stream))
    await asyncio.sleep(3.0)
    b = await place.shard("b")
    await settle()
    assert b.times == [3.0]
    b.give(10, finish=LENGTH)
    assert await reading == ([10], LENGTH)


@in_virtual_time
async def test_without_a_new_token_for_too_long_a_stream_ends_unavailable(place: Place) -> None:
    a = await place.shard("a")
    a.answers = [None, *[unavailable()] * 1000]
    stream = await place.open()
    a.give(10)
    await asyncio.sleep(100.0)  # a slow shard is no lost shard
    a.send(a.jobs[0].request_id, 1, finish=DOWN)
    with pytest.raises(Unavailable) as down:
        await place.tokens(stream)
    assert (down.value.reason, down.value.retry_after_s) == ("SHARDS_DOWN", 1.0)
    assert asyncio.get_running_loop().time() == pytest.approx(100.0 + RECOVERY_S)
    place.streams.close(stream)


@in_virtual_time
async def test_shards_that_take_a_stream_and_fail_are_not_tried_for_ever(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open()
    reading = asyncio.create_task(place.tokens(stream))
    while not reading.done():
        await asyncio.sleep(7.0)
        if not stream.streams[0].adrift:
            a.send(a.jobs[-1].request_id, 0, finish=DOWN)
    with pytest.raises(Unavailable):
        await reading
    assert asyncio.get_running_loop().time() < RECOVERY_S + 20
    place.streams.close(stream)


@in_virtual_time
async def test_the_deadline_passes_while_a_stream_waits(place: Place) -> None:
    await place.shard("a")
    stream = await place.open(timeout_s=4.0)
    place.streams.lose_peer("a")
    with pytest.raises(DeadlineExceeded):
        await place.tokens(stream)
    assert asyncio.get_running_loop().time() == pytest.approx(4.0)
    place.streams.close(stream)


@in_virtual_time
async def test_a_client_may_go_while_its_stream_waits(place: Place) -> None:
    await place.shard("a")
    stream = await place.open()
    place.streams.lose_peer("a")
    reading = asyncio.create_task(place.tokens(stream))
    await settle()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    place.streams.close(stream)
    b = await place.shard("b")
    await settle()
    assert not b.jobs


@in_virtual_time
async def test_a_client_may_go_while_its_stream_is_submitted_anew(place: Place) -> None:
    await place.shard("a")
    b = await place.shard("b")
    stream = await place.open()
    b.answers = [FakeShard.HANG]
    place.streams.lose_peer("a")
    reading = asyncio.create_task(place.tokens(stream))
    await settle()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    place.streams.close(stream)
    assert b.aborted == []  # it must not overtake the submission
    b.pending[0].set_result(None)
    assert b.aborted == [b.jobs[0].request_id]
    await settle()


@in_virtual_time
async def test_abort_reaches_streams_that_run_and_that_wait(place: Place) -> None:
    a = await place.shard("a")
    running, waiting = await place.open(request_id="1"), await place.open(request_id="2")
    reading = [asyncio.create_task(place.tokens(stream)) for stream in (running, waiting)]
    a.give(10, job=1)
    a.send(a.jobs[1].request_id, 1, finish=DOWN)
    a.answers = [unavailable()] * 100
    await asyncio.sleep(3.0)
    for stream in (running, waiting):
        place.streams.abort(stream)
        place.streams.abort(stream)
    assert await asyncio.gather(*reading) == [([], FinishReason.CANCELLED), ([10], FinishReason.CANCELLED)]
    assert a.aborted == [a.jobs[0].request_id]
    a.give(77, job=0)


@in_virtual_time
async def test_abort_while_the_first_submission_is_on_its_way(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    a.answers = [FakeShard.HANG]
    opening = asyncio.create_task(place.open())
    await settle()
    found = place.streams.find("r", "")
    assert found is not None
    place.streams.abort(found)
    assert await place.tokens(await opening) == ([], FinishReason.CANCELLED)
    a.pending[0].set_result(unavailable())
    await settle()
    assert (a.aborted, b.jobs) == ([a.jobs[0].request_id], [])


@in_virtual_time
async def test_abort_reaches_a_stream_that_has_no_shard(place: Place) -> None:
    await place.shard("a")
    stream = await place.open()
    place.streams.lose_peer("a")
    reading = asyncio.create_task(place.tokens(stream))
    await asyncio.sleep(3.0)
    place.streams.abort(stream)
    assert await reading == ([], FinishReason.CANCELLED)
    assert asyncio.get_running_loop().time() == 3.0


@in_virtual_time
async def test_abort_and_refusal_at_once(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    a.answers = [FakeShard.HANG]
    opening = asyncio.create_task(place.open())
    await settle()
    found = place.streams.find("r", "")
    assert found is not None
    place.streams.abort(found)
    a.pending[0].set_result(unavailable())
    assert await place.tokens(await opening) == ([], FinishReason.CANCELLED)
    assert (len(a.jobs), b.jobs) == (1, [])


@in_virtual_time
async def test_late_events_of_an_earlier_run_are_dropped(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open()
    reading = asyncio.create_task(place.tokens(stream))
    a.give(10)
    place.streams.lose_peer("a")
    a.send(a.jobs[0].request_id, 1, 66, finish=LENGTH)
    await settle()
    b.give(11)
    a.send(a.jobs[0].request_id, 2, 66, finish=LENGTH)
    b.send(b.jobs[0].request_id, 1, 11)  # nor is a token told twice
    b.send(b.jobs[0].request_id, 2, 12, finish=LENGTH)
    assert await reading == ([10, 11, 12], LENGTH)


@in_virtual_time
async def test_a_gap_is_an_error_of_ours(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open()
    a.give(10)
    a.send(a.jobs[0].request_id, 2, 12)
    events = await place.rest(stream)
    assert [(event.token, event.finish) for event in events] == [(10, None), (None, FinishReason.ERROR)]
    assert "index 2 after 1 tokens" in events[-1].message
    assert a.aborted == [a.jobs[0].request_id]


@in_virtual_time
async def test_an_error_of_the_request_itself_is_not_replayed(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open()
    a.send(a.jobs[0].request_id, 0, finish=FinishReason.ERROR, message="NaN")
    assert await place.tokens(stream) == ([], FinishReason.ERROR)
    assert not b.jobs


@pytest.mark.parametrize(("fields", "tokens", "reason"), [
    ({"stop_ids": frozenset({9})}, [10, 9], STOP),
    ({"max_tokens": 2}, [10, 11], LENGTH),
    ({"max_tokens": 2, "stop_ids": frozenset({9})}, [10, 9], STOP),
])  # fmt: skip
def test_a_log_that_is_the_whole_answer_needs_no_shard(
    fields: dict[str, object], tokens: list[int], reason: FinishReason
) -> None:
    @in_virtual_time
    async def check(place: Place) -> None:
        a, b = await place.shard("a"), await place.shard("b")
        stream = await place.open(**fields)
        a.give(*tokens)
        place.streams.lose_peer("a")
        assert await place.tokens(stream) == (tokens, reason)
        assert not b.jobs

    check()


@in_virtual_time
async def test_an_admitted_stream_is_not_told_that_it_is_invalid(place: Place) -> None:
    await place.shard("a")
    b = await place.shard("b")
    stream = await place.open()
    b.answers = [Refusal(Refusal.INVALID, "prompt_ids: too long", field="prompt_ids")]
    place.streams.lose_peer("a")
    with pytest.raises(Internal):
        await place.tokens(stream)
    place.streams.close(stream)


@in_virtual_time
async def test_a_retired_shard_gets_nothing_new_and_may_finish(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open(request_id="1")
    retiring = asyncio.create_task(place.streams.retire_peer("a", 30.0))
    await settle()
    others = [await place.open(request_id=f"b{n}") for n in range(3)]
    assert (len(a.jobs), len(b.jobs)) == (1, 3)
    a.give(10, finish=LENGTH)
    assert await retiring == 0
    assert asyncio.get_running_loop().time() < 1
    assert await place.tokens(stream) == ([10], LENGTH)
    for other in others:
        place.streams.close(other)
    assert a.aborted == []


@in_virtual_time
async def test_a_retired_shards_last_streams_are_moved(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    streams = [await place.open(request_id=f"{n}") for n in range(4)]
    runs = [group.streams[0].run for group in streams]
    on_a = [run for run in runs if run is not None and run.peer.name == "a"]
    reading = [asyncio.create_task(place.tokens(stream)) for stream in streams]
    for job in range(2):
        a.give(10 + job, job=job)
    assert await place.streams.retire_peer("a", 3.0) == len(on_a) == 2
    await settle()
    assert asyncio.get_running_loop().time() == pytest.approx(3.0)
    assert a.aborted == [job.request_id for job in a.jobs]
    assert [job.generated_ids for job in b.jobs] == [(), (), (10,), (11,)]
    for job in range(4):
        b.give(20 + job, job=job, finish=LENGTH)
    ended = await asyncio.gather(*reading)
    assert sorted(ended) == [([10, 22], LENGTH), ([11, 23], LENGTH), ([20], LENGTH), ([21], LENGTH)]
    assert place.streams.replays == 2
    with pytest.raises(ValueError, match="attention shard 'a' is or was connected"):
        await place.streams.add_peer(a.peer)
    assert await place.streams.retire_peer("a", 3.0) == 0
    with pytest.raises(ValueError, match=r"connected are \['b'\]"):
        await place.streams.retire_peer("z", 3.0)


@in_virtual_time
async def test_the_only_shard_keeps_its_streams(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open()
    with pytest.raises(OnlyShard, match="'a' stays: no other could take its 1 streams"):
        await place.streams.retire_peer("a", 3.0)
    assert a.aborted == []
    other = await place.open(request_id="other")  # and serves on
    a.give(10, job=0, finish=LENGTH)
    a.give(11, job=1, finish=LENGTH)
    assert [await place.tokens(s) for s in (stream, other)] == [([10], LENGTH), ([11], LENGTH)]
    assert await place.streams.retire_peer("a", 3.0) == 0
    assert not place.streams.ready
    with pytest.raises(Unavailable):
        await place.open()


@in_virtual_time
async def test_two_shards_that_retire_together_move_nothing_to_each_other(place: Place) -> None:
    a, b, c = [await place.shard(name) for name in "abc"]
    streams = [await place.open(request_id=f"{n}") for n in range(3)]
    reading = [asyncio.create_task(place.tokens(stream)) for stream in streams]
    moved = await asyncio.gather(*[place.streams.retire_peer(name, 1.0) for name in "ab"])
    await settle()
    assert (moved, [len(shard.jobs) for shard in (a, b, c)]) == ([1, 1], [1, 1, 3])
    for job in range(3):
        c.give(10, job=job, finish=LENGTH)
    assert await asyncio.gather(*reading) == [([10], LENGTH)] * 3


@in_virtual_time
async def test_a_shard_that_dies_while_it_retires_is_done(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open()
    reading = asyncio.create_task(place.tokens(stream))
    retiring = asyncio.create_task(place.streams.retire_peer("a", 30.0))
    await settle()
    place.streams.lose_peer("a")
    assert await retiring == 0
    await settle()
    b.give(10, finish=LENGTH)
    assert await reading == ([10], LENGTH)
    assert a.aborted == []


@in_virtual_time
async def test_only_what_was_connected_can_retire(place: Place) -> None:
    await place.shard("a")
    with pytest.raises(ValueError, match=r"'z' is not connected; connected are \['a'\]"):
        await place.streams.retire_peer("z", 1.0)


@in_virtual_time
async def test_drain_refuses_the_new_and_replays_the_old(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    stream = await place.open()
    reading = asyncio.create_task(place.tokens(stream))
    draining = asyncio.create_task(place.streams.drain(5.0))
    await settle()
    with pytest.raises(Unavailable) as refusal:
        await place.open(request_id="late")
    assert refusal.value.reason == "DRAINING"
    place.streams.lose_peer("a")
    await settle()
    b.give(10, finish=LENGTH)
    assert await reading == ([10], LENGTH)
    await draining
    assert asyncio.get_running_loop().time() < 1
    assert len(a.jobs) == 1


@in_virtual_time
async def test_what_a_drain_leaves_ends_with_unavailable(place: Place) -> None:
    a = await place.shard("a")
    streams = [await place.open(), await place.open(request_id="another")]
    calls = [asyncio.create_task(place.news(stream)) for stream in streams]
    await settle()
    await place.streams.drain(5.0)
    for stream, call in zip(streams, calls, strict=True):
        with pytest.raises(Unavailable) as ended:
            await call
        assert ended.value.reason == "DRAINING"
        place.streams.close(stream)
    assert len(a.aborted) == 2, "the engine frees them"


@in_virtual_time
async def test_ids_are_a_tenants_own(place: Place) -> None:
    a = await place.shard("a")
    ours, theirs = await place.open("us"), await place.open("them", max_tokens=3)
    assert place.streams.find("r", "us") is ours
    assert place.streams.find("r", "them") is theirs
    assert place.streams.find("r", "") is None
    with pytest.raises(Conflict):
        await place.open("us", max_tokens=3)
    again = await place.open("us")  # takes the place of ours
    assert await place.tokens(ours) == ([], FinishReason.CANCELLED)
    assert place.streams.find("r", "us") is again
    a.give(10, job=2, finish=LENGTH)
    a.give(11, job=1, finish=LENGTH)
    assert [await place.tokens(stream) for stream in (again, theirs)] == [([10], LENGTH), ([11], LENGTH)]


@in_virtual_time
async def test_a_suspect_is_tried_last_and_not_for_ever_suspected(place: Place) -> None:
    a, b = await place.shard("a"), await place.shard("b")
    first = await place.open(request_id="1")
    a.send(a.jobs[0].request_id, 0, finish=DOWN)
    streams = [await place.open(request_id=f"{n}") for n in range(2, 5)]
    assert (len(a.jobs), len(b.jobs)) == (1, 3)
    await asyncio.sleep(10.5)
    streams.append(await place.open(request_id="5"))
    assert (len(a.jobs), len(b.jobs)) == (2, 3)
    for stream in (first, *streams):
        place.streams.close(stream)


@in_virtual_time
async def test_a_stream_is_not_asked_for_more_than_its_end(place: Place) -> None:
    a = await place.shard("a")
    stream = await place.open()
    a.give(10, finish=LENGTH)
    await place.news(stream)
    with pytest.raises(RuntimeError, match="the end of request 'r' was taken before"):
        await place.news(stream)
    place.streams.close(stream)


@in_virtual_time
async def test_who_watches_is_told_when_the_call_has_the_token_already(place: Place) -> None:
    a = await place.shard("a")
    seen: list[tuple[list[int], bool]] = []
    group = await place.open()
    (stream,) = group.streams
    stream.watch = Watch("", lambda event, choice: seen.append((list(stream.log), stream.has_news)))
    a.give(10, 11, finish=LENGTH)
    assert seen == [([10], True), ([10, 11], True)]
    assert await place.tokens(group) == ([10, 11], LENGTH)


def test_a_stream_that_goes_on_elsewhere_is_logged_with_its_request(caplog: pytest.LogCaptureFixture) -> None:
    @in_virtual_time
    async def whole(place: Place) -> None:
        a, _ = await place.shard("a"), await place.shard("b")
        stream = await place.streams.open(
            request("r-7"), None, EVERYBODY, Watch(TRACEPARENT, lambda event, choice: None)
        )
        a.send(a.jobs[0].request_id, 0, finish=DOWN, message="void")
        place.streams.close(stream)

    whole()
    (entry,) = caplog.records
    ids = {"trace_id": f"{TRACE_ID:032x}", "span_id": f"{PARENT_ID:016x}"}
    assert vars(entry)["fields"] == {"request_id": "r-7", **ids}
