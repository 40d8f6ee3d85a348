"""What ``actors/transport/base.py`` promises, demanded of every medium."""

from __future__ import annotations

import ctypes
import random
import threading
import time
import tracemalloc

import pytest

from actors.transport.base import (
    MAX_FRAME_BYTES,
    MAX_PARTS,
    Frame,
    FrameTag,
    Medium,
    PeerGone,
    TransportError,
    Wire,
    WireTimeout,
)
from actors.transport.blocks import ALIGNMENT
from actors.transport.poller import Poller
from tests.multiprocess.transport.conftest import Bench
from tests.multiprocess.transport.remote import digest, parts_of, payload, recv_digest, send_shape, soon

MIB = 1 << 20
TAG = FrameTag(epoch=1, step=2, micro_batch=3, layer=4, attempt=5)


def become_ready(wire: Wire) -> None:
    poller = Poller()
    poller.add(wire)
    assert poller.wait(soon()) == [wire]
    poller.close()


def address_of(part: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(part))


def send_often(wire: Wire, block: bytes, deadline: float) -> None:
    """More than any medium keeps for a peer that does not receive."""
    for _ in range(8):
        wire.send(1, TAG, [block], deadline)


SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (0, 5, 0),
    (1,),
    (1,) * MAX_PARTS,
    (4096,),
    (100_001, 0, 3 * MIB + 1, 7),
    (4 * MIB - 68,),
    (64 * MIB,),
]


def test_frames_of_every_shape_come_back_the_same(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    remote.tell("echo", len(SHAPES))
    for index, sizes in enumerate(SHAPES):
        tag = FrameTag(2**32 - 1, 2**64 - 1, index, 2**32 - 1, 2**32 - 1)
        sent = send_shape(wire, (65535 - index, tag, sizes, index))
        frame = wire.recv(soon())
        assert digest(frame.kind, frame.tag, frame.parts) == sent
        assert all(address_of(part) % ALIGNMENT == 0 for part in frame.parts if part)
    remote.hear()
    assert wire.stats.frames_sent == wire.stats.frames_received == len(SHAPES)
    assert wire.stats.bytes_sent == wire.stats.bytes_received == sum(map(sum, SHAPES)) + 68 * len(SHAPES)


def test_parts_may_be_any_contiguous_buffer(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    remote.tell("echo", 1)
    floats = memoryview(bytearray(payload(96, 1))).cast("f").cast("B").cast("f", (4, 6))
    empty = memoryview(b"").cast("f")
    wire.send(1, TAG, [floats, empty, bytearray(b"xyz")], soon())  # type: ignore[list-item]
    parts = wire.recv(soon()).parts
    assert [bytes(part) for part in parts] == [floats.tobytes(), b"", b"xyz"]
    assert all(part.format == "B" and not part.readonly for part in parts)


def test_two_thousand_random_exchanges_keep_order_and_content(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium, ring_bytes=64 << 10)  # small, so that its end is crossed often
    rng = random.Random(11)
    total = 2000
    remote.tell("echo", total)
    step = 0
    while step < total:
        sent = []
        for _ in range(min(rng.randint(1, 6), total - step)):
            sizes = tuple(int(2 ** rng.uniform(0, 13)) - 1 for _ in range(rng.randint(0, MAX_PARTS)))
            sent.append(send_shape(wire, (rng.randrange(65536), FrameTag(step=step), sizes, step)))
            step += 1
        assert [recv_digest(wire) for _ in sent] == sent
    assert remote.hear() is None


def test_received_parts_stay_until_the_next_recv(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    remote.call("send", (1, TAG, (300_000,), 5))
    frame = wire.recv(soon())
    # Neither taking in what arrives nor sending, even the very same memory, touches it.
    remote.call("send", (2, TAG, (300_000,), 6))
    become_ready(wire)
    remote.tell("recv")
    wire.send(1, TAG, frame.parts, soon())
    assert remote.hear() == digest(1, TAG, [payload(300_000, 5)])
    assert frame.parts[0] == payload(300_000, 5)
    assert wire.recv(soon()).parts[0] == payload(300_000, 6)


def test_limits_are_refused_and_hurt_nobody(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    eighth = bytes(MAX_FRAME_BYTES // 8 + 1)
    with pytest.raises(ValueError, match="9 parts; at most 8"):
        wire.send(1, TAG, [b""] * (MAX_PARTS + 1), soon())
    with pytest.raises(ValueError, match="at most 268435456"):
        wire.send(1, TAG, [eighth] * 8, soon())
    with pytest.raises(ValueError, match="not contiguous"):
        wire.send(1, TAG, [memoryview(b"abcdef")[::2]], soon())
    with pytest.raises(ValueError, match="kind 65536"):
        wire.send(65536, TAG, [], soon())
    with pytest.raises(ValueError, match="layer=-1"):
        wire.send(1, FrameTag(layer=-1), [], soon())
    remote.tell("echo", 1)
    assert send_shape(wire, (1, TAG, (5,), 0)) == recv_digest(wire)


def test_recv_times_out_and_succeeds_later(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    start = time.monotonic()
    with pytest.raises(WireTimeout, match="there"):
        wire.recv(start + 0.1)
    assert 0.1 <= time.monotonic() - start < 1.0
    sent = remote.call("send", (1, TAG, (9,), 0))
    assert recv_digest(wire) == sent


def test_a_past_deadline_takes_what_is_here(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    with pytest.raises(WireTimeout):
        wire.recv(0.0)
    remote.call("send", (1, TAG, (9,), 0))
    become_ready(wire)
    assert wire.recv(0.0).kind == 1


def test_a_send_that_times_out_tears_the_wire(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    block = bytes(32 * MIB)
    start = time.monotonic()
    with pytest.raises(WireTimeout, match="there"):
        send_often(wire, block, start + 0.3)
    assert time.monotonic() - start < 2.0
    with pytest.raises(PeerGone):
        wire.send(1, TAG, [], soon())
    with pytest.raises(PeerGone):
        wire.recv(soon())
    answers = [remote.call("recv"), remote.call("recv")]
    assert answers[-1] == "PeerGone"


def test_a_waiting_send_goes_on_once_the_peer_receives(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)

    def receive() -> None:
        for _ in range(4):
            remote.tell("recv")

    later = threading.Timer(0.1, receive)
    later.start()
    sent = [send_shape(wire, (1, TAG, (8 * MIB,), step)) for step in range(4)]
    later.join()
    assert [remote.hear() for _ in sent] == sent


def test_both_may_send_sixty_four_mebibytes_first(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    remote.tell("swap", (1, TAG, (64 * MIB, 1), 3))
    sent = send_shape(wire, (2, TAG, (64 * MIB, 2), 4))
    received = recv_digest(wire)
    assert remote.hear() == (received, sent)


def test_frames_before_a_close_arrive_and_then_it_is_gone(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    sent = [remote.call("send", (1, FrameTag(step=step), (1000,), step)) for step in range(3)]
    remote.call("close")
    assert [recv_digest(wire) for _ in sent] == sent
    for _ in range(2):
        with pytest.raises(PeerGone):
            wire.recv(soon())
    assert wire.ready()
    with pytest.raises(PeerGone):
        wire.send(1, TAG, [bytes(64 * MIB)], soon())


def test_send_to_a_closed_peer_never_waits(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    remote.call("close")
    start = time.monotonic()
    with pytest.raises(PeerGone):
        wire.send(1, TAG, [bytes(64 * MIB)], soon())
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize("call", ["recv", "send"])
def test_close_from_another_thread_wakes_a_waiting_call(bench: Bench, medium: Medium, call: str) -> None:
    wire, _ = bench.link(medium)
    raised: list[TransportError] = []
    waits = threading.Event()
    await_ = wire._waiter.wait  # type: ignore[attr-defined]

    def announced(*arguments: object) -> object:
        waits.set()
        return await_(*arguments)

    wire._waiter.wait = announced  # type: ignore[attr-defined]

    def work() -> None:
        try:
            while call == "send":
                wire.send(1, TAG, [bytes(32 * MIB)], soon())
            wire.recv(soon())
        except TransportError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert waits.wait(20)
    wire.close()
    wire.close()
    thread.join(20)
    assert [type(error) for error in raised] == [PeerGone]
    assert "at this end" in str(raised[0])
    assert wire.filenos() == ()


@pytest.mark.parametrize("ours", [True, False])
def test_stale_frames_are_dropped_and_counted(bench: Bench, medium: Medium, ours: bool) -> None:
    """Whether they arrive before the fence or after it."""
    wire, remote = bench.link(medium)
    keys = [(1, 9, 9), (2, 4, 9), (2, 5, 0), (2, 5, 1), (2, 6, 0), (3, 0, 0)]
    if not ours:
        wire.fence(FrameTag(epoch=2, step=5, attempt=1))
    for epoch, step, attempt in keys:
        tag = FrameTag(epoch=epoch, step=step, attempt=attempt, layer=1, micro_batch=1)
        remote.call("send", (1, tag, (10,), 0))
    if ours:
        become_ready(wire)
        wire.fence(FrameTag(epoch=2, step=5, attempt=1))
    wire.fence(FrameTag(epoch=1))  # a fence never goes down
    assert [wire.recv(soon()).tag.fence_key for _ in range(3)] == keys[3:]
    assert wire.stats.dropped == 3
    assert wire.stats.frames_received == 6


def test_a_stale_frame_does_not_make_a_wire_ready(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    remote.call("send", (1, FrameTag(epoch=1), (10,), 0))
    become_ready(wire)
    wire.fence(FrameTag(epoch=2))
    assert not wire.ready()
    with pytest.raises(WireTimeout):
        wire.recv(0.0)
    assert wire.stats.dropped == 1


def test_a_dead_peer_disturbs_no_other_wire(bench: Bench, medium: Medium) -> None:
    (bad, bad_remote), (good, good_remote) = bench.link(medium, "bad"), bench.link(medium, "good")
    good_remote.tell("echo", 20)
    for step in range(20):
        if step == 10:
            bad_remote.call("close")
            with pytest.raises(PeerGone):
                bad.recv(soon())
            bad.close()
        assert send_shape(good, (1, FrameTag(step=step), (5000,), step)) == recv_digest(good)


def test_waiting_burns_no_cpu(bench: Bench, medium: Medium) -> None:
    wire, _ = bench.link(medium)
    poller = Poller()
    poller.add(wire)
    start = time.thread_time()
    for _ in range(2):
        with pytest.raises(WireTimeout):
            wire.recv(soon(0.4))
        assert poller.wait(soon(0.4)) == []
    poller.close()
    assert time.thread_time() - start < 0.02


def test_the_steady_state_allocates_no_payload_memory(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    part = payload(200_000, 1)
    rounds, warm_up = 120, 20
    remote.tell("echo", rounds)

    def exchange(step: int) -> Frame:
        wire.send(1, FrameTag(step=step), [part] * (1 + step % 4), soon())
        return wire.recv(soon())

    for step in range(warm_up):
        exchange(step)
    tracemalloc.start()
    base, _ = tracemalloc.get_traced_memory()
    for step in range(warm_up, rounds):
        assert exchange(step).parts[0] == part
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - base < 50_000, "a part is 200,000 bytes"


def test_kill_while_we_wait_is_told_at_once(bench: Bench, far: Medium) -> None:
    wire, remote = bench.link(far)
    remote.tell("echo", 2)
    assert send_shape(wire, (1, TAG, (10,), 0)) == recv_digest(wire)
    killer = threading.Timer(0.2, remote.process.kill)
    killer.start()
    start = time.monotonic()
    with pytest.raises(PeerGone, match="there"):
        wire.recv(soon())
    assert time.monotonic() - start < 5.0
    killer.join()


def test_kill_in_the_middle_of_a_frame_to_us(bench: Bench, far: Medium) -> None:
    wire, remote = bench.link(far)
    whole = remote.call("send", (1, TAG, (MIB,), 0))
    remote.tell("die_sending", (1, TAG, (64 * MIB,), 0))
    assert recv_digest(wire) == whole
    with pytest.raises(PeerGone):
        wire.recv(soon())
    assert remote.process.join() == -9
    assert wire.stats.frames_received == 1


def test_kill_in_the_middle_of_a_frame_from_us(bench: Bench, far: Medium) -> None:
    wire, remote = bench.link(far)
    remote.tell("die_receiving", 32 * MIB)
    with pytest.raises(PeerGone):
        wire.send(1, TAG, [bytes(64 * MIB)], soon())
    assert remote.process.join() == -9
    with pytest.raises(PeerGone):
        wire.recv(soon())


def test_a_stopped_peer_is_a_timeout_and_may_come_back(bench: Bench, far: Medium) -> None:
    wire, remote = bench.link(far)
    remote.tell("echo", 1)
    remote.process.stop()
    sent = send_shape(wire, (1, TAG, (1000,), 0))
    start = time.monotonic()
    with pytest.raises(WireTimeout):
        wire.recv(start + 0.2)
    assert time.monotonic() - start < 1.0
    remote.process.resume()
    assert recv_digest(wire) == sent


def test_a_stopped_peer_times_a_large_send_out(bench: Bench, far: Medium) -> None:
    wire, remote = bench.link(far)
    remote.process.stop()
    with pytest.raises(WireTimeout):
        wire.send(1, TAG, [bytes(64 * MIB)], soon(0.2))
    remote.process.resume()
    assert remote.call("recv") == "PeerGone"


def test_a_frame_larger_than_the_ring_streams_through_it(bench: Bench) -> None:
    wire, remote = bench.link(Medium.SHM, ring_bytes=64 << 10)
    remote.tell("echo", 1)
    parts = parts_of((3 * MIB + 17, 5, MIB), 2)
    wire.send(1, TAG, parts, soon())
    assert [bytes(part) for part in wire.recv(soon()).parts] == parts
