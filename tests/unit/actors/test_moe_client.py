"""An attention shard's wire to its router: which frames are marked, and how long was waited for the answers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from actors import moe_client
from actors.frames import Kind
from actors.messages import CPU, BatchTimes, encode_times, tensor_bytes
from actors.moe_client import MoEClient, MoEUnavailable, RowsSent
from actors.transport.base import Frame, Wire
from actors.transport.local import local_pair
from tests.span_recorder import TRACEPARENT

D = 4
TIMES = BatchTimes(0.25, 0.5)
LAYERS = tuple(range(20))
ROWS = torch.arange(3 * D, dtype=torch.float32).view(3, D)


@pytest.fixture
def pair() -> Iterator[tuple[MoEClient, Wire]]:
    """The client, and its router's end."""
    near, far = local_pair("attention", "router")
    yield MoEClient(near, torch.float32, CPU, D, 5.0, LAYERS), far
    near.close()
    far.close()


def layer(client: MoEClient, router: Wire, number: int) -> list[bytes]:
    """One layer, whose rows come back as they are; returns the parts that the router got."""
    sent = client.start(number, ROWS)
    frame = router.recv(time.monotonic() + 5)
    parts = [bytes(part) for part in frame.parts]
    router.send(Kind.ROWS_DONE, frame.tag, [parts[0], encode_times(TIMES)], time.monotonic() + 5)
    assert torch.equal(client.finish(sent), ROWS)
    return parts


def test_only_the_traced_step_and_few_layers_are_marked(pair: tuple[MoEClient, Wire]) -> None:
    client, router = pair
    plain, mark = bytes(tensor_bytes(ROWS)), TRACEPARENT.encode()
    marked = []
    for traceparent in ("", TRACEPARENT, ""):
        client.begin_step(traceparent)
        got = {number: layer(client, router, number) for number in LAYERS}
        assert all(parts in ([plain], [plain, mark]) for parts in got.values())
        marked.append({number for number, parts in got.items() if len(parts) == 2})
    assert marked == [set(), moe_client.traced_layers(LAYERS), set()]
    assert len(marked[1]) == 16


def test_rows_are_sent_as_they_are_now(pair: tuple[MoEClient, Wire]) -> None:
    """A step has one tensor for all layers, and changes its numbers; views are copied each time."""
    client, router = pair
    own = torch.arange(6 * D, dtype=torch.float32).view(6, D)
    client.begin_step()
    for rows in (own, own, own[::2], own[::2], own.T.contiguous().T, own):
        own += 1
        sent = client.start(1, rows)
        frame = router.recv(time.monotonic() + 5)
        assert bytes(frame.parts[0]) == bytes(tensor_bytes(rows.clone().contiguous()))
        router.send(Kind.ROWS_DONE, frame.tag, [bytes(frame.parts[0]), encode_times(TIMES)], time.monotonic() + 5)
        client.finish(sent)


def test_waits_of_a_step_add_up_and_the_next_begins_anew(
    pair: tuple[MoEClient, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is a second later, so each wait takes one."""
    client, router = pair
    seconds = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)), monotonic=time.monotonic)
    monkeypatch.setattr(moe_client, "time", clock)
    for layers in (3, 2):
        client.begin_step()
        assert (client.batches, client.waited_s) == (0, 0.0)
        for number in range(layers):
            layer(client, router, number)
        assert (client.batches, client.waited_s) == (layers, float(layers))


def test_a_wait_in_vain_counts_as_well(pair: tuple[MoEClient, Wire]) -> None:
    client, router = pair
    client.begin_step()
    sent = client.start(1, ROWS)
    router.close()
    with pytest.raises(MoEUnavailable):
        client.finish(sent)
    assert client.batches == 1
    assert client.waited_s > 0


def ask(client: MoEClient, router: Wire, count: int) -> tuple[list[RowsSent], list[Frame]]:
    """Rows of so many micro-batches of one layer, and what the router got: each with its own rows."""
    sent = [client.start(1, ROWS + number, count - 1 - number) for number in range(count)]
    return sent, [reply(router.recv(soon())) for _ in sent]


def reply(frame: Frame) -> Frame:
    """A copy that outlives the next one."""
    return Frame(frame.kind, frame.tag, tuple(memoryview(bytes(part)) for part in frame.parts))


def answer(router: Wire, frame: Frame, times: BatchTimes = TIMES) -> None:
    router.send(Kind.ROWS_DONE, frame.tag, [frame.parts[0], encode_times(times)], soon())


def soon() -> float:
    return time.monotonic() + 5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_each_micro_batch_gets_its_own_rows_in_whatever_order_they_come(
    pair: tuple[MoEClient, Wire], order: tuple[int, ...]
) -> None:
    client, router = pair
    for _ in range(2):
        client.begin_step()
        sent, frames = ask(client, router, 3)
        assert [frame.tag.micro_batch for frame in frames] == [2, 1, 0]
        for number in order:
            answer(router, frames[number])
        for number, one in enumerate(sent):
            assert torch.equal(client.finish(one), ROWS + number)
        assert client.batches == 3


def test_an_answer_that_came_early_stays_until_it_is_asked_for(pair: tuple[MoEClient, Wire]) -> None:
    client, router = pair
    client.begin_step()
    sent, frames = ask(client, router, 3)
    answer(router, frames[1])
    answer(router, frames[0])
    assert torch.equal(client.finish(sent[0]), ROWS)
    answer(router, frames[2])
    assert torch.equal(client.finish(sent[2]), ROWS + 2)
    assert torch.equal(client.finish(sent[1]), ROWS + 1)


def test_answers_that_wait_take_no_new_memory(pair: tuple[MoEClient, Wire]) -> None:
    client, router = pair
    allocations = []
    for _ in range(4):
        client.begin_step()
        sent, frames = ask(client, router, 3)
        for frame in reversed(frames):
            answer(router, frame)
        for one in sent:
            client.finish(one)
        allocations.append(client.wire._pool.allocations)  # type: ignore[attr-defined]
    assert len(set(allocations[1:])) == 1


def test_what_waited_of_a_void_step_is_forgotten(pair: tuple[MoEClient, Wire]) -> None:
    client, router = pair
    client.begin_step()
    sent, frames = ask(client, router, 3)
    answer(router, frames[2])
    router.send(Kind.FAILED, frames[0].tag, [b"no memory"], soon())
    with pytest.raises(MoEUnavailable, match="no memory"):
        client.finish(sent[1])
    client.abandon()
    assert not client._sent
    answer(router, frames[1])
    client.begin_step()
    layer(client, router, 1)
    assert client.wire.stats.dropped == 1


def test_an_answer_to_nothing_or_given_twice_is_refused(pair: tuple[MoEClient, Wire]) -> None:
    client, router = pair
    for strange in (lambda frame: frame, lambda frame: frame._replace(layer=7)):
        client.begin_step()
        sent, frames = ask(client, router, 2)
        answer(router, frames[1])
        router.send(Kind.ROWS_DONE, strange(frames[1].tag), [frames[1].parts[0], encode_times(TIMES)], soon())
        with pytest.raises(MoEUnavailable, match="expected ROWS_DONE for"):
            client.finish(sent[0])


@pytest.mark.parametrize("early", [True, False], ids=["answered already", "answered meanwhile"])
def test_what_is_to_be_done_when_rows_were_sent_is_done_once(pair: tuple[MoEClient, Wire], early: bool) -> None:
    client, router = pair
    client.begin_step()
    (sent, other), frames = ask(client, router, 2)
    calls: list[str] = []

    def answer_all() -> None:
        for frame in frames:
            answer(router, frame)

    def work() -> None:
        calls.append("done")
        if not early:
            answer_all()

    if early:
        answer_all()
    client.when_sent = work
    for one in (sent, other):
        client.finish(one)
    assert calls == ["done"]
    assert client.when_sent is None


def test_what_is_done_meanwhile_costs_the_step_no_time(
    pair: tuple[MoEClient, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer than a step may."""
    client, router = pair
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=time.monotonic)
    monkeypatch.setattr(moe_client, "time", clock)
    client.begin_step()
    (sent,), (frame,) = ask(client, router, 1)
    before = client._deadline

    def work() -> None:
        clock.monotonic = lambda: time.monotonic() + 1000.0
        answer(router, frame)

    client.when_sent = work
    client.finish(sent)
    assert client._deadline == pytest.approx(before + 1000.0, abs=5.0)


@pytest.mark.parametrize("waits", [True, False])
def test_times_of_computing_and_of_transfer_add_up(
    pair: tuple[MoEClient, Wire], monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """Looks at the clock, each a second later: sent (0), wait begins (1) and ends (2), here (3). An answer that was
    here before counts by the router's time, half a second."""
    client, router = pair
    seconds = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)), monotonic=time.monotonic)
    monkeypatch.setattr(moe_client, "time", clock)
    ready = type(client.wire).ready
    monkeypatch.setattr(type(client.wire), "ready", lambda wire: ready(wire) and not (waits and wire is client.wire))
    for _ in range(2):
        client.begin_step()
        for number in range(3):
            layer(client, router, number)
        trip = 3.0 if waits else TIMES.router_s
        assert client.experts_s == 3 * TIMES.experts_s
        assert client.transfer_s == pytest.approx(3 * (trip - TIMES.experts_s) / 2)


def test_a_lagging_clock_makes_no_negative_transfer(pair: tuple[MoEClient, Wire]) -> None:
    """A GPU tells the time of the batch before, which may have been larger."""
    client, router = pair
    client.begin_step()
    (sent,), (frame,) = ask(client, router, 1)
    answer(router, frame, BatchTimes(60.0, 0.1))
    client.finish(sent)
    assert (client.experts_s, client.transfer_s) == (60.0, 0.0)
