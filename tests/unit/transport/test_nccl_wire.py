"""The GPU wire between two members in one process, over the communicator double."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from actors.transport.base import FrameTag, PeerGone, ProtocolError, Wire, WireTimeout
from actors.transport.local import local_pair
from actors.transport.nccl import ANNOUNCED, NcclWire
from actors.transport.nccl_form import form_group
from actors.transport.nccl_group import GroupPlan, NcclGroup
from actors.transport.nccl_rooms import ROOM_BYTES
from actors.transport.poller import Poller
from tests.multiprocess.transport.nccl_double import GARBAGE, DoubleBackend
from tests.waiting import until

TAG = FrameTag(epoch=1, step=4, layer=2)
ROWS = torch.arange(24, dtype=torch.float32).view(4, 6)


class Pair(NamedTuple):
    """A router's and a shard's end of one wire, the bare companion of the shard, and their groups."""

    router: NcclWire
    shard: NcclWire
    companion: Wire
    groups: tuple[NcclGroup, NcclGroup]


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def formed(timeout_s: float = 10.0) -> tuple[NcclGroup, NcclGroup]:
    """The groups of router "r" and shard "s"."""
    backend = DoubleBackend()
    plan = GroupPlan(1, backend.unique_id(), backend.unique_id(), backend.unique_id(), ("r",), ("s",))
    made: dict[str, NcclGroup] = {}

    def form(name: str) -> None:
        made[name] = form_group(plan, name, backend, soon(), timeout_s)

    thread = threading.Thread(target=form, args=("s",))
    thread.start()
    form("r")
    thread.join()
    return made["r"], made["s"]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two members; nothing of them is left behind."""
    threads = threading.active_count()
    groups = formed(0.5)
    here, there = local_pair("r", "s")
    pair = Pair(NcclWire(here, groups[0]), NcclWire(there, groups[1]), there, groups)
    yield pair
    pair.router.close()
    pair.shard.close()
    for group in groups:
        group.close()
    until(lambda: threading.active_count() == threads)


def rows_of(part: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    assert isinstance(part, torch.Tensor)
    assert part.dtype == torch.uint8
    return part.view(dtype)


def test_tensors_and_memory_arrive_in_their_places(pair: Pair) -> None:
    parts: list[Any] = [b"one", ROWS, memoryview(b"two"), torch.empty(0), ROWS.bfloat16()]
    pair.router.send(7, TAG, parts, soon())
    frame = pair.shard.recv(soon())
    assert (frame.kind, frame.tag) == (7, TAG)
    assert [bytes(frame.parts[0]), bytes(frame.parts[2])] == [b"one", b"two"]
    assert torch.equal(rows_of(frame.parts[1]).view(4, 6), ROWS)
    assert rows_of(frame.parts[3]).numel() == 0
    assert torch.equal(rows_of(frame.parts[4], torch.bfloat16), ROWS.bfloat16().view(-1))
    pair.shard.send(8, TAG, [ROWS + 1], soon())
    assert torch.equal(rows_of(pair.router.recv(soon()).parts[0]).view(4, 6), ROWS + 1)
    assert pair.router.stats.bytes_sent == pair.shard.stats.bytes_received


def test_frames_without_tensors_pass_the_companion_as_they_are(pair: Pair) -> None:
    pair.router.send(5, TAG, [b"text", b""], soon())
    assert [bytes(part) for part in pair.companion.recv(soon()).parts] == [b"text", b""]
    pair.router.send(5, TAG, [], soon())
    assert pair.shard.recv(soon()).parts == ()


def test_kinds_of_frames_keep_their_order(pair: Pair) -> None:
    """A host frame behind a device frame waits for its payload."""
    pair.router.send(1, TAG, [torch.zeros(4 << 20, dtype=torch.uint8)], soon())
    pair.router.send(2, TAG, [b"x"], soon())
    assert [pair.shard.recv(soon()).kind, pair.shard.recv(soon()).kind] == [1, 2]


def test_the_callers_tensor_is_its_own_again_after_send(pair: Pair) -> None:
    mine = ROWS.clone()
    with pair.groups[0].batch():
        pair.router.send(1, TAG, [mine], soon())
        mine.zero_()
    assert torch.equal(rows_of(pair.shard.recv(soon()).parts[0]).view(4, 6), ROWS)


def test_received_tensors_stay_until_the_next_recv(pair: Pair) -> None:
    pair.router.send(1, TAG, [ROWS], soon())
    first = rows_of(pair.shard.recv(soon()).parts[0])
    pair.router.send(1, TAG, [-ROWS], soon())
    until(pair.shard.ready)
    assert torch.equal(first.view(4, 6), ROWS)
    assert torch.equal(rows_of(pair.shard.recv(soon()).parts[0]).view(4, 6), -ROWS)


def test_nothing_is_announced_before_the_last_exchange_has_ended(pair: Pair) -> None:
    """Else receives could be queued for payload that waits behind other payload."""
    pair.router.send(1, TAG, [ROWS], soon())
    announced = pair.companion.recv(soon())
    assert announced.kind == 1 | ANNOUNCED
    assert struct.unpack("<2q", announced.parts[0]) == (0, ROWS.nbytes)
    with pytest.raises(WireTimeout, match="had not ended"):
        pair.router.send(2, TAG, [ROWS], soon(0.05))
    with pytest.raises(PeerGone):  # the end is all that came
        pair.companion.recv(soon())
    assert "had not ended" in (pair.groups[0].failure or "")
    with pytest.raises(PeerGone):
        pair.router.recv(soon())


def test_a_waiting_send_takes_in_what_arrives_on_every_wire_of_the_group(pair: Pair) -> None:
    """Both send, and send again: each waits for its first, which the other must receive meanwhile."""
    got: dict[NcclWire, list[int]] = {}

    def talk(wire: NcclWire) -> None:
        for step in range(3):
            wire.send(step, TAG, [torch.full((3 << 20,), step, dtype=torch.uint8)], soon())
        got[wire] = [wire.recv(soon()).kind for _ in range(3)]

    thread = threading.Thread(target=talk, args=(pair.shard,))
    thread.start()
    talk(pair.router)
    thread.join()
    assert got == {pair.router: [0, 1, 2], pair.shard: [0, 1, 2]}


def test_the_steady_state_allocates_no_device_memory(pair: Pair) -> None:
    def there_and_back() -> tuple[int, int]:
        for rows in (1, 40, 700):
            pair.router.send(1, TAG, [torch.ones(rows, 64)], soon())
            pair.shard.send(2, TAG, [pair.shard.recv(soon()).parts[0]], soon())
            pair.router.recv(soon())
        return pair.groups[0].pool.allocations, pair.groups[1].pool.allocations

    there_and_back()
    first = there_and_back()
    assert [there_and_back() for _ in range(5)] == [first] * 5


def test_stale_frames_are_dropped_after_their_payload_has_arrived(pair: Pair) -> None:
    pair.shard.fence(FrameTag(epoch=2))
    for epoch in (1, 1, 2):
        pair.router.send(1, FrameTag(epoch=epoch), [ROWS], soon())
        until(lambda: pair.shard.ready() or pair.groups[0].completed(pair.groups[0]._under_way))  # type: ignore[arg-type]
    assert pair.shard.recv(soon()).tag.epoch == 2
    assert pair.shard.stats.dropped == 2


def test_a_poller_is_woken_when_the_payload_has_arrived(pair: Pair) -> None:
    poller = Poller(0.0)
    poller.add(pair.shard)
    assert poller.wait(soon(0.02)) == []
    pair.router.send(1, TAG, [torch.zeros(8 << 20, dtype=torch.uint8)], soon())
    assert poller.wait(soon()) == [pair.shard]
    pair.shard.recv(time.monotonic())
    poller.close()


def test_payload_that_never_comes_ends_the_group_at_the_deadline(pair: Pair) -> None:
    """The announcement is forged: nothing will be sent. What the abort leaves behind is not handed out."""
    pair.router._companion.send(1 | ANNOUNCED, TAG, [struct.pack("<2q", 0, 16)], soon())
    begin = time.monotonic()
    with pytest.raises(PeerGone, match="payload announced by r did not end before its deadline"):
        pair.shard.recv(soon())
    assert 0.3 < time.monotonic() - begin < 5.0
    with pytest.raises(PeerGone):
        pair.shard.send(1, TAG, [ROWS], soon())


def test_what_an_abort_leaves_behind_is_never_handed_out(pair: Pair) -> None:
    pair.router._companion.send(1 | ANNOUNCED, TAG, [struct.pack("<2q", 0, 16)], soon())
    until(lambda: pair.shard.ready() or bool(pair.shard._landing))
    (landing,) = pair.shard._landing
    pair.groups[1].abort("for the test")
    assert landing.pending is not None
    until(landing.pending.done)
    assert torch.as_tensor(landing.parts[0]).eq(GARBAGE).all()
    with pytest.raises(PeerGone, match="for the test"):
        pair.shard.recv(soon())


def test_an_error_that_the_library_notices_ends_the_group(pair: Pair) -> None:
    pair.router._companion.send(1 | ANNOUNCED, TAG, [struct.pack("<2q", 0, 16)], soon())
    pair.groups[1]._incoming.broken = "a link is down"  # type: ignore[attr-defined]
    with pytest.raises(PeerGone, match="a link is down"):
        pair.shard.recv(soon())


def test_a_lost_companion_ends_the_group_and_a_farewell_does_not(pair: Pair) -> None:
    pair.router.close()
    with pytest.raises(PeerGone, match="'r' closed its nccl wire"):
        pair.shard.recv(soon())
    assert pair.groups[1].failure is None


def test_a_peer_that_ends_without_farewell_ends_the_group(pair: Pair) -> None:
    pair.router._companion.close()
    with pytest.raises(PeerGone, match="closed its local wire"):
        pair.shard.recv(soon())
    assert pair.groups[1].failure is not None


def test_a_wire_of_a_group_that_is_over_says_no_farewell(pair: Pair) -> None:
    """The peer would take it for an orderly end, and wait for payload that never comes."""
    pair.groups[0].abort("for the test")
    pair.router.close()
    with pytest.raises(PeerGone, match="closed its local wire"):
        pair.shard.recv(soon())
    assert pair.groups[1].failure is not None


@pytest.mark.parametrize(
    "plan",
    [
        b"",
        b"1234567",
        *(struct.pack("<2q", 0, size) for size in (-2, -1, 1 << 40)),  # less than nothing, not here, too much
        *(struct.pack("<2q", how, 16) for how in (-2, -1, 1 << 40)),  # no way to come, not asked for, too large a room
        bytes(8 * 10),
    ],
)
def test_a_garbled_announcement_ends_the_group(pair: Pair, plan: bytes) -> None:
    pair.router._companion.send(1 | ANNOUNCED, TAG, [plan], soon())
    with pytest.raises(ProtocolError, match=r"'r' announced (parts|an answer) of"):
        pair.shard.recv(soon())
    assert pair.groups[1].failure is not None


@pytest.mark.parametrize(
    ("kind", "parts", "text"),
    [
        (ANNOUNCED, [], "kind is 32768; allowed on an nccl wire are 0 to 32767"),
        (1, [ROWS] * 9, "a frame has 9 parts"),
        (1, [ROWS.t()], r"shape \(6, 4\).* is not contiguous"),
        (1, [torch.empty(1).expand(1 << 27)], "a frame of 536870912 bytes"),
    ],
)
def test_limits_are_refused_and_hurt_nobody(pair: Pair, kind: int, parts: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pair.router.send(kind, TAG, parts, soon())
    pair.router.send(1, TAG, [ROWS], soon())
    assert pair.shard.recv(soon()).kind == 1


def test_a_stranger_gets_no_wire(pair: Pair) -> None:
    here, there = local_pair("r", "x")
    with pytest.raises(ValueError, match="'x' is not in the group of epoch 1: r, s"):
        NcclWire(here, pair.groups[0])
    here.close()
    there.close()


def ask(pair: Pair, step: int, answer_bytes: int = ROWS.nbytes, seconds: float = 10.0) -> FrameTag:
    """A question of the router's that the shard has received."""
    tag = FrameTag(epoch=1, step=step)
    pair.router.ask(1, tag, [ROWS], answer_bytes, soon(seconds))
    assert pair.shard.recv(soon()).tag == tag
    return tag


def no_exact_receive(pair: Pair) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a receive was posted when the answer was announced")

    pair.groups[0].receive = refuse  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_answer_that_was_asked_for_has_its_receive_posted_before(pair: Pair, dtype: torch.dtype) -> None:
    """Rows in the model's dtype, or fp32 partial sums; with what belongs to them in host memory."""
    no_exact_receive(pair)
    for step in range(4):
        tag = ask(pair, step, answer_bytes=200)
        pair.shard.send(2, tag, [(ROWS + step).to(dtype), b"seconds", torch.ones(3).to(dtype)], soon())
        frame = pair.router.recv(soon())
        assert (frame.kind, frame.tag, frame.parts[1]) == (2, tag, b"seconds")
        assert torch.equal(rows_of(frame.parts[0], dtype).view(4, 6), (ROWS + step).to(dtype))
        assert torch.equal(rows_of(frame.parts[2], dtype), torch.ones(3).to(dtype))


def test_an_answer_without_tensors_goes_there_too(pair: Pair) -> None:
    """As when the shard cannot compute: the room is free again for the next one."""
    no_exact_receive(pair)
    for step in range(3):
        pair.shard.send(5, ask(pair, step), [b"out of memory"], soon())
        assert [bytes(part) for part in pair.router.recv(soon()).parts] == [b"out of memory"]


def test_answers_in_rooms_and_others_keep_their_order(pair: Pair) -> None:
    tag = ask(pair, 1)
    other = FrameTag(epoch=1, step=9)
    pair.shard.send(2, tag, [ROWS], soon())
    pair.shard.send(3, other, [ROWS * 2], soon())
    pair.shard.send(4, other, [b"host"], soon())
    assert [pair.router.recv(soon()).kind for _ in range(3)] == [2, 3, 4]


def test_a_large_answer_and_one_while_rooms_are_taken_come_exactly(pair: Pair) -> None:
    large = ask(pair, 1, ROOM_BYTES + 1)
    first, second = ask(pair, 2), ask(pair, 3)
    assert [tag in pair.shard._owed for tag in (large, first, second)] == [False, True, False]
    for tag in (large, second, first):
        pair.shard.send(2, tag, [ROWS], soon())
        assert pair.router.recv(soon()).tag == tag
    assert ask(pair, 4) in pair.shard._owed


def test_an_answer_larger_than_was_asked_for_is_refused(pair: Pair) -> None:
    tag = ask(pair, 1, 64)
    with pytest.raises(ValueError, match="an answer of 128 bytes to 'r', which asked for at most 64"):
        pair.shard.send(2, tag, [ROWS], soon())
    pair.shard.send(5, tag, [b"too large"], soon())
    assert pair.router.recv(soon()).kind == 5


def test_rooms_are_reused(pair: Pair) -> None:
    def rounds() -> tuple[int, int]:
        for step, rows in enumerate((1, 40, 700)):
            tag = ask(pair, step, rows * 256)
            pair.shard.send(2, tag, [torch.ones(rows, 64)], soon())
            pair.router.recv(soon())
        return pair.groups[0].pool.allocations, pair.groups[1].pool.allocations

    rounds()
    first = rounds()
    assert [rounds() for _ in range(5)] == [first] * 5


def test_a_question_that_nobody_answers_ends_the_group_at_its_deadline(pair: Pair) -> None:
    ask(pair, 1, seconds=0.3)
    with pytest.raises(PeerGone, match="answers of s did not end before its deadline"):
        pair.router.recv(soon())


def test_a_peer_that_leaves_and_owes_an_answer_ends_the_group(pair: Pair) -> None:
    ask(pair, 1)
    pair.shard.close()
    with pytest.raises(PeerGone, match="owes answers"):
        pair.router.recv(soon())
    assert pair.groups[0].failure is not None


@pytest.mark.parametrize("asks", [True, False])
def test_sending_to_a_peer_that_left_in_order_leaves_the_group_alone(pair: Pair, asks: bool) -> None:
    pair.shard.close()
    with pytest.raises(PeerGone):
        pair.router.ask(1, TAG, [ROWS], 96 if asks else 0, soon())
    assert pair.groups[0].failure is None
    assert pair.groups[0]._rooms._under_way is None, "a receive was posted that nobody will answer"
