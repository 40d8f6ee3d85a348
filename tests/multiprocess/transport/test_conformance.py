"""What ``actors/transport/base.py`` promises, demanded of every medium: local, shm, tcp and nccl (over the double).

Which tests hold which paragraph of the contract:

* Order and loss: ``TestContents``, ``test_each_byte_...`` (a frame is there whole or not at all).
* Pairwise: ``TestManyPeers``.
* Deadlines: ``TestDeadlines``. Stalls: ``TestSlowAndStoppedPeers``. Death: ``TestDeath``.
* Both may send first, and a sender's memory: ``TestBothSendFirst``.
* Buffers: ``TestBuffers``. Stale frames: ``TestStaleFrames``. Threads, waiting: ``TestThreadsAndWaiting``.
* Nothing is left behind: the ``bench`` fixture, after each of these tests, on both sides.

Which media a test cannot apply to, and why: beside the fixtures ``far`` and ``stream`` in conftest.py. What is nccl's
own (epochs of a group, batches, the watchdog) is in test_nccl.py; waiting on several wires in test_poller.py.
"""

from __future__ import annotations

import ctypes
import random
import socket
import threading
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from actors.transport.base import (
    MAX_FRAME_BYTES,
    MAX_PARTS,
    FrameTag,
    Medium,
    Part,
    PeerGone,
    TransportError,
    Wire,
    WireTimeout,
)
from actors.transport.blocks import ALIGNMENT, footprint
from actors.transport.frame import HEADER_BYTES
from actors.transport.nccl import NcclWire
from actors.transport.poller import Poller
from actors.transport.stream import Poll, StreamWire
from actors.transport.tcp import TcpWire
from actors.transport.waiting import Waiter
from tests.multiprocess.peers import Peer
from tests.multiprocess.transport.bench import Bench, Link
from tests.multiprocess.transport.remote import (
    Digest,
    Point,
    carried,
    cut_sending,
    data_of,
    digest,
    parts_of,
    payload,
    recv_digest,
    resident_bytes,
    send_shape,
    soon,
)
from tests.multiprocess.transport.servers import Server

MIB = 1 << 20
TAG = FrameTag(epoch=1, step=2, micro_batch=3, layer=4, attempt=5)
NAMES = ("p0", "p1", "p2")
SHARES = [(70_001, 1, 0), (0, 300_000, 5), (2 * MIB, 2 * MIB, 2 * MIB), (0, 0, 1)]
"""Bytes for each of three peers: uneven, empty, large to all, almost all empty."""


def become_ready(wire: Wire) -> None:
    poller = Poller()
    poller.add(wire)
    assert poller.wait(soon()) == [wire]
    poller.close()


def address_of(part: Part) -> int:
    return part.data_ptr() if isinstance(part, Tensor) else ctypes.addressof(ctypes.c_char.from_buffer(part))


def send_often(wire: Wire, deadline: float) -> None:
    """More than any medium keeps for a peer that does not receive."""
    block = carried(wire, [bytes(32 * MIB)])
    for _ in range(8):
        wire.send(1, TAG, block, deadline)


def lower_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this end alone: what a waiting send takes in."""
    for module in ("stream", "nccl"):
        monkeypatch.setattr(f"actors.transport.{module}.MAX_BACKLOG_BYTES", 2 * MIB)


def waiter_of_sends(wire: Any) -> Waiter:
    """What a send of this wire waits with."""
    waiter: Waiter = wire._group._waiter if isinstance(wire, NcclWire) else wire._waiter
    return waiter


def takes_in_no_more(wire: Any) -> bool:
    """A send that waits finds the backlog full."""
    if isinstance(wire, NcclWire):
        return not wire._hungry()
    full: bool = wire._backlog >= 2 * MIB
    return full


def send_both(wire: Wire, parts: list[bytes]) -> None:
    """A frame, and an empty one after it."""
    wire.send(1, TAG, parts, soon())
    wire.send(1, TAG, [], soon())


def receive_all(wire: Wire, came: list[Digest]) -> None:
    """Until the wire ends."""
    while True:
        came.append(recv_digest(wire))


def exchange(link: Link, sizes: tuple[int, ...], step: int) -> None:
    """One frame to an echo and back."""
    assert send_shape(link.wire, (1, FrameTag(step=step), sizes, step)) == recv_digest(link.wire)


class TestContents:
    SHAPES: Sequence[tuple[int, ...]] = [
        (),
        (0,),
        (0, 5, 0),
        (1,),
        (1,) * MAX_PARTS,
        (63, 64, 65),
        (4096,),
        (100_001, 0, 3 * MIB + 1, 7),
        (4 * MIB - HEADER_BYTES,),
        (64 * MIB,),
    ]

    def test_frames_from_nothing_to_sixty_four_mebibytes_come_back_the_same(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        remote.tell("echo", len(self.SHAPES))
        for index, sizes in enumerate(self.SHAPES):
            tag = FrameTag(2**32 - 1, 2**64 - 1, index, 2**32 - 1, 2**32 - 1)
            sent = send_shape(wire, (0x7FFF - index, tag, sizes, index))
            frame = wire.recv(soon())
            assert digest(frame.kind, frame.tag, frame.parts) == sent
            assert all(address_of(part) % ALIGNMENT == 0 for part in frame.parts if len(part))
        remote.hear()
        assert wire.stats.frames_sent == wire.stats.frames_received == len(self.SHAPES)
        total = sum(map(sum, self.SHAPES)) + HEADER_BYTES * len(self.SHAPES)
        assert wire.stats.bytes_sent == wire.stats.bytes_received == total

    def test_host_parts_may_be_any_contiguous_buffer(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        remote.tell("echo", 1)
        floats = memoryview(bytearray(payload(96, 1))).cast("f").cast("B").cast("f", (4, 6))
        empty = memoryview(b"").cast("f")
        wire.send(1, TAG, [floats, empty, bytearray(b"xyz")], soon())
        parts = wire.recv(soon()).parts
        assert [bytes(data_of(part)) for part in parts] == [floats.tobytes(), b"", b"xyz"]
        assert all(data_of(part).format == "B" and not data_of(part).readonly for part in parts)

    def test_ten_thousand_random_exchanges_keep_order_and_content(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium, ring_bytes=64 << 10)  # small, so that its end is crossed often
        rng = random.Random(11)
        total = 10_000
        remote.tell("echo", total)
        step = 0
        while step < total:
            sent = []
            for _ in range(min(rng.randint(1, 6), total - step)):
                sizes = tuple(int(2 ** rng.uniform(0, 13)) - 1 for _ in range(rng.choice((0, 1, 1, 1, 2, MAX_PARTS))))
                sent.append(send_shape(wire, (rng.randrange(1 << 15), FrameTag(step=step), sizes, step)))
                step += 1
            assert [recv_digest(wire) for _ in sent] == sent
        assert remote.hear() is None

    def test_limits_are_refused_and_hurt_nobody(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        eighth = bytes(MAX_FRAME_BYTES // 8 + 1)
        with pytest.raises(ValueError, match="9 parts; at most 8"):
            wire.send(1, TAG, [b""] * (MAX_PARTS + 1), soon())
        with pytest.raises(ValueError, match="at most 268435456"):
            wire.send(1, TAG, [eighth] * 8, soon())
        with pytest.raises(ValueError, match="not contiguous"):
            wire.send(1, TAG, [memoryview(b"abcdef")[::2]], soon())
        with pytest.raises(ValueError, match="kind"):
            wire.send(65536, TAG, carried(wire, [b"x"]), soon())
        with pytest.raises(ValueError, match="layer=-1"):
            wire.send(1, FrameTag(layer=-1), carried(wire, [b"x"]), soon())
        remote.tell("echo", 1)
        exchange(Link(wire, remote), (5,), 0)


class TestManyPeers:
    def test_all_to_one_in_uneven_shares(self, bench: Bench, medium: Medium) -> None:
        links = bench.links(medium, NAMES)
        for step, shares in enumerate(SHARES):
            for link, size in zip(links, shares, strict=True):
                link.remote.tell("send", (1, FrameTag(step=step), (size, 3), step))
            got = {link.wire.peer: recv_digest(link.wire) for link in reversed(links)}
            assert got == {link.wire.peer: link.remote.hear() for link in links}

    def test_one_to_all_in_uneven_shares(self, bench: Bench, medium: Medium) -> None:
        links = bench.links(medium, NAMES)
        for step, shares in enumerate(SHARES):
            for link in links:
                link.remote.tell("recv")
            with bench.batch(links):
                sent = [
                    send_shape(link.wire, (1, FrameTag(step=step), (size, 3), step + at))
                    for at, (link, size) in enumerate(zip(links, shares, strict=True))
                ]
            assert [link.remote.hear() for link in links] == sent

    def test_a_batch_to_all_is_answered_by_all_many_times(self, bench: Bench, medium: Medium) -> None:
        links = bench.links(medium, NAMES)
        rounds, rng = 100, random.Random(5)
        for link in links:
            link.remote.tell("echo", rounds)
        for step in range(rounds):
            with bench.batch(links):
                sent = [
                    send_shape(link.wire, (1, FrameTag(step=step), (rng.choice((0, 1, 900, 70_000)),), step))
                    for link in links
                ]
            assert [recv_digest(link.wire) for link in links] == sent

    def test_a_dead_peer_disturbs_no_other_wire(self, bench: Bench, medium: Medium) -> None:
        """Over nccl: no other group. What a group does is in test_nccl.py."""
        bad, good = bench.link(medium, "bad"), bench.link(medium, "good")
        good.remote.tell("echo", 20)
        for step in range(20):
            if step == 10:
                bad.remote.call("close")
                with pytest.raises(PeerGone):
                    bad.wire.recv(soon())
                bad.wire.close()
            exchange(good, (5000,), step)

    def test_peers_come_and_go_while_others_exchange(self, bench: Bench, medium: Medium) -> None:
        steady, rounds = bench.link(medium, "steady"), 60
        steady.remote.tell("echo", rounds)
        names = iter(f"guest-{at}" for at in range(rounds))
        for step in range(rounds):
            if step % 20 == 5:
                guest = bench.link(medium, next(names))
                guest.remote.tell("echo", 5)
            if step % 20 in range(5, 10):
                exchange(guest, (20_000,), step)
            if step % 20 == 15:
                if step == 35 and medium is not Medium.LOCAL:
                    guest.remote.process.kill()
                    with pytest.raises(PeerGone):
                        guest.wire.recv(soon())
                guest.wire.close()
            exchange(steady, (30_000, 1), step)
        assert steady.remote.hear() is None


class TestBuffers:
    def test_received_parts_stay_until_the_next_recv(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        remote.call("send", (1, TAG, (300_000,), 5))
        frame = wire.recv(soon())
        # Neither taking in what arrives nor sending, even the very same memory, touches it.
        remote.call("send", (2, TAG, (300_000,), 6))
        become_ready(wire)
        assert wire.ready()
        # Had ready() given the first frame's memory back, a third one would come to lie there; the fence drops the
        # second, so that it is taken in while the first is held.
        newer = TAG._replace(step=TAG.step + 1)
        remote.call("send", (3, newer, (300_000,), 7))
        wire.fence(newer)
        become_ready(wire)
        remote.tell("recv")
        wire.send(1, TAG, frame.parts, soon())
        assert remote.hear() == digest(1, TAG, [payload(300_000, 5)])
        assert data_of(frame.parts[0]) == payload(300_000, 5)
        assert data_of(wire.recv(soon()).parts[0]) == payload(300_000, 7)

    def test_received_parts_stay_however_much_a_send_takes_in(self, bench: Bench, medium: Medium) -> None:
        """More than a ring holds comes while a small frame is in the caller's hands."""
        wire, remote = bench.link(medium, ring_bytes=64 << 10)
        remote.call("send", (1, TAG, (1000, 9), 5))
        frame = wire.recv(soon())
        remote.tell("swap", (2, TAG, (2 * MIB,), 6))
        sent = send_shape(wire, (3, TAG, (2 * MIB,), 7))
        assert [data_of(part) for part in frame.parts] == parts_of((1000, 9), 5)
        received = recv_digest(wire)
        assert remote.hear() == (received, sent)

    def test_a_frame_that_is_kept_stays_until_it_is_let_go(self, bench: Bench, medium: Medium) -> None:
        """Through later frames; its memory is used again then, and may be let go after the wire has ended."""
        wire, remote = bench.link(medium)
        remote.call("send", (1, TAG, (300_000,), 5))
        kept = wire.recv(soon()).parts[0]
        let_go = wire.keep()
        wire.keep()()  # it is kept already: nothing is left to let go of
        place = address_of(kept)
        for seed in (6, 7):
            remote.call("send", (2, TAG, (300_000,), seed))
            assert data_of(wire.recv(soon()).parts[0]) == payload(300_000, seed)
            assert data_of(kept) == payload(300_000, 5)
        last = wire.keep()
        let_go()
        remote.call("send", (3, TAG, (300_000,), 8))
        frame = wire.recv(soon())
        assert address_of(frame.parts[0]) == place
        wire.close()
        last()

    def test_what_was_sent_is_the_callers_again(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        remote.tell("recv")
        mine: Any = carried(wire, [payload(70_000, 1)])[0]
        mine = bytearray(mine) if isinstance(mine, bytes) else mine
        wire.send(1, TAG, [mine], soon())
        data_of(mine)[:] = bytes(70_000)
        assert remote.hear() == digest(1, TAG, [payload(70_000, 1)])

    def test_the_steady_state_allocates_no_payload_memory(self, bench: Bench, medium: Medium) -> None:
        """By tracemalloc, by where the parts lie, by the pools' own counts, and by both processes' memory."""
        wire, remote = bench.link(medium)
        part = payload(200_000, 1)
        rounds, warm_up = 200, 40
        mine = carried(wire, [part])

        def run(steps: range) -> list[int]:
            remote.tell("echo", len(steps))
            seen = []
            for step in steps:
                wire.send(1, FrameTag(step=step), mine * (1 + step % 4), soon())
                parts = wire.recv(soon()).parts
                assert all(data_of(part) == data_of(mine[0]) for part in parts)
                seen += [address_of(part) for part in parts]
            remote.hear()
            return seen

        known = set(run(range(warm_up)))
        pools, there, here = allocations(wire), remote.call("resident"), resident_bytes()
        tracemalloc.start()
        base, _ = tracemalloc.get_traced_memory()
        seen = set(run(range(warm_up, rounds)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak - base < 50_000, "a part is 200,000 bytes"
        assert seen <= known, "payload came to lie in memory that was not used before"
        assert allocations(wire) == pools
        # 160 exchanges carry 80 MB each way
        assert remote.call("resident") - there < 4 * MIB
        assert resident_bytes() - here < 4 * MIB


def allocations(wire: Wire) -> int:
    """What the pools of our end have made so far."""
    pools = [wire._pool] + ([wire._group.pool] if isinstance(wire, NcclWire) else [])  # type: ignore[attr-defined]
    return sum(pool.allocations for pool in pools)


class TestDeadlines:
    def test_recv_times_out_and_succeeds_later(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        start = time.monotonic()
        with pytest.raises(WireTimeout, match="there"):
            wire.recv(start + 0.1)
        assert 0.1 <= time.monotonic() - start < 1.0
        sent = remote.call("send", (1, TAG, (9,), 0))
        assert recv_digest(wire) == sent

    def test_a_past_deadline_takes_what_is_here(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        with pytest.raises(WireTimeout):
            wire.recv(0.0)
        remote.call("send", (1, TAG, (9,), 0))
        become_ready(wire)
        assert wire.recv(0.0).kind == 1

    def test_a_send_that_times_out_tears_the_wire(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        start = time.monotonic()
        with pytest.raises(WireTimeout, match=r"there|last exchange"):
            send_often(wire, start + 0.3)
        assert time.monotonic() - start < 2.0
        with pytest.raises(PeerGone):
            wire.send(1, TAG, carried(wire, [b"x"]), soon())
        with pytest.raises(PeerGone):
            wire.recv(soon())
        assert wire.filenos() == (), "it is closed"
        start = time.monotonic()
        answers = [remote.call("recv"), remote.call("recv")]
        assert answers[-1] == "PeerGone"
        assert time.monotonic() - start < 5.0, "the peer was not told"


class TestSlowAndStoppedPeers:
    def test_a_waiting_send_goes_on_once_the_peer_receives(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)

        def receive() -> None:
            for _ in range(4):
                remote.tell("recv")

        later = threading.Timer(0.1, receive)
        later.start()
        sent = [send_shape(wire, (1, TAG, (8 * MIB,), step)) for step in range(4)]
        later.join()
        assert [remote.hear() for _ in sent] == sent

    def test_a_slow_peer_gets_everything_and_slows_nobody_else(self, bench: Bench, medium: Medium) -> None:
        slow, quick = bench.link(medium, "slow"), bench.link(medium, "quick")
        slow.remote.tell("echo", 20, 0.02)
        quick.remote.tell("echo", 50)
        sent = [send_shape(slow.wire, (1, FrameTag(step=step), (1000,), step)) for step in range(1)]
        start = time.monotonic()
        for step in range(50):
            exchange(quick, (1000,), step)
        assert time.monotonic() - start < 2.0
        sent += [send_shape(slow.wire, (1, FrameTag(step=step), (50_000,), step)) for step in range(1, 20)]
        assert [recv_digest(slow.wire) for _ in sent] == sent

    def test_a_stopped_peer_is_a_timeout_and_may_come_back(self, bench: Bench, far: Medium) -> None:
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

    def test_a_stopped_peer_times_sends_out_and_finds_itself_outside(self, bench: Bench, far: Medium) -> None:
        wire, remote = bench.link(far)
        remote.process.stop()
        with pytest.raises(WireTimeout):
            send_often(wire, soon(0.2))
        remote.process.resume()
        assert [remote.call("recv"), remote.call("recv")][-1] == "PeerGone"

    def test_a_stopped_peer_may_be_killed(self, bench: Bench, far: Medium) -> None:
        wire, remote = bench.link(far)
        remote.process.stop()
        with pytest.raises(WireTimeout):
            wire.recv(soon(0.1))
        remote.process.kill()
        start = time.monotonic()
        with pytest.raises(PeerGone):
            wire.recv(soon())
        assert time.monotonic() - start < 5.0


class TestBothSendFirst:
    def test_both_may_send_sixty_four_mebibytes_first(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        for seed in range(2):  # over nccl the second send waits for the first to have arrived
            remote.tell("swap", (1, TAG, (64 * MIB, 1), seed))
            sent = send_shape(wire, (2, TAG, (64 * MIB, 2), seed + 4))
            received = recv_digest(wire)
            assert remote.hear() == (received, sent)

    def test_both_may_send_many_frames_first(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        for step in range(8):
            remote.tell("send", (1, FrameTag(step=step), (3 * MIB,), step))
        for _ in range(8):
            remote.tell("recv")
        sent = [send_shape(wire, (2, FrameTag(step=step), (3 * MIB,), step)) for step in range(8)]
        received = [recv_digest(wire) for _ in sent]
        assert received == [remote.hear() for _ in sent]
        assert [remote.hear() for _ in sent] == sent

    def test_what_a_waiting_send_takes_in_is_bounded(
        self, bench: Bench, far: Medium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not over local: the limit is lowered for this end alone."""
        lower_backlog(monkeypatch)
        wire, remote = bench.link(far, ring_bytes=MIB)
        for step in range(12):
            remote.tell("send", (1, FrameTag(step=step), (MIB,), step))
        for _ in range(3):
            remote.tell("recv")
        sent = [send_shape(wire, (2, FrameTag(step=step), (32 * MIB,), step)) for step in range(3)]
        assert wire._backlog < 4 * MIB + 4 * HEADER_BYTES  # type: ignore[attr-defined]
        received = [recv_digest(wire) for _ in range(12)]
        assert received == [remote.hear() for _ in received]
        assert [remote.hear() for _ in sent] == sent


class TestDeath:
    def test_frames_before_a_close_arrive_and_then_it_is_gone(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        for step in range(3):
            remote.tell("send", (1, FrameTag(step=step), (1000,), step))
        remote.tell("close")
        received = [recv_digest(wire) for _ in range(3)]
        assert received == [remote.hear() for _ in range(3)]
        for _ in range(2):
            with pytest.raises(PeerGone):
                wire.recv(soon())
        assert wire.ready()
        assert wire.buffered()

    def test_send_to_a_closed_peer_never_waits(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        remote.call("close")
        start = time.monotonic()
        with pytest.raises(PeerGone):
            send_often(wire, soon())
        assert time.monotonic() - start < 2.0

    def test_kill_while_we_wait_is_told_at_once(self, bench: Bench, far: Medium) -> None:
        wire, remote = bench.link(far)
        remote.tell("echo", 2)
        exchange(Link(wire, remote), (10,), 0)
        killer = threading.Timer(0.2, remote.process.kill)
        killer.start()
        start = time.monotonic()
        with pytest.raises(PeerGone, match="there"):
            wire.recv(soon())
        assert time.monotonic() - start < 5.0
        killer.join()

    def test_kill_while_a_send_waits_with_a_full_backlog_is_told_at_once(
        self, bench: Bench, far: Medium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes in nothing more then, so that only its wait for room can notice the end."""
        lower_backlog(monkeypatch)
        wire, remote = bench.link(far, ring_bytes=MIB)
        for step in range(4):
            remote.tell("send", (1, FrameTag(step=step), (MIB,), step))
        killed: list[float] = []
        waiter: Any = waiter_of_sends(wire)
        wait = waiter.wait

        def killing(poll: Poll, deadline: float) -> object:
            if not killed and takes_in_no_more(wire):
                remote.process.kill()
                killed.append(time.monotonic())
            return wait(poll, deadline)

        waiter.wait = killing
        with pytest.raises(PeerGone):
            send_often(wire, soon())
        assert time.monotonic() - killed[0] < 1.0

    def test_kill_before_the_hello_disturbs_nobody(self, bench: Bench, far: Medium) -> None:
        job = bench.mute(far)
        with Peer("tests.multiprocess.transport.remote:run_mute", job) as mute:
            assert mute.recv() == "connected"
            mute.kill()
        if far is Medium.NCCL:  # the one wire that is waited for
            with pytest.raises(WireTimeout, match="no wire from mute"):
                bench.wait_for_mute(job)
        link = bench.link(far)
        link.remote.tell("echo", 1)
        exchange(link, (100,), 0)

    @pytest.mark.parametrize("point", Point)
    def test_kill_of_a_sender(self, bench: Bench, far: Medium, point: Point) -> None:
        """What came before is there; of the last frame everything, or else nothing."""
        wire, remote = bench.link(far)
        remote.tell("send", (1, TAG, (MIB,), 0))
        whole = recv_digest(wire)
        assert whole == remote.hear()
        last = 7, TAG, (8 * MIB, 11), 3
        remote.tell("die_sending", point, last)
        start = time.monotonic()
        came: list[Digest] = []
        with pytest.raises(PeerGone):
            receive_all(wire, came)
        assert remote.process.join() == -9
        assert time.monotonic() - start < 5.0
        all_of_it = [digest(7, TAG, parts_of(*last[2:]))]
        if point is not Point.SENT:
            assert came == []
        elif far is not Medium.NCCL:
            assert came == all_of_it
        else:  # its send returns before the payload has left
            assert came in ([], all_of_it)

    def test_kill_of_a_receiver(self, bench: Bench, far: Medium) -> None:
        wire, remote = bench.link(far)
        remote.tell("die_receiving", 32 * MIB)
        start = time.monotonic()
        with pytest.raises(PeerGone):
            send_often(wire, soon())
        assert remote.process.join() == -9
        with pytest.raises(PeerGone):
            wire.recv(soon())
        assert time.monotonic() - start < 5.0

    def test_each_byte_may_be_the_last(self, server: Server, stream: Medium) -> None:
        """The stream is cut after every number of bytes: a frame is there whole or not at all."""
        parts = [b"abc", b"", b"0123456789"]
        total = HEADER_BYTES + footprint([len(part) for part in parts])
        for at in range(1, total + 1):
            wire, accepted = server.pair(stream)
            assert isinstance(wire, StreamWire)
            cut_sending(wire, at, wire.close)
            with pytest.raises((PeerGone, ValueError)):  # shm: its memory is gone under the cut call
                send_both(wire, parts)
            if at == total:
                assert [bytes(data_of(part)) for part in accepted.recv(soon()).parts] == parts
            with pytest.raises(PeerGone):
                accepted.recv(soon())
            assert accepted.stats.frames_received == (at == total)
            accepted.close()


class TestStaleFrames:
    @pytest.mark.parametrize("after_arrival", [True, False])
    def test_late_frames_are_dropped_and_counted(self, bench: Bench, medium: Medium, after_arrival: bool) -> None:
        """Of an older epoch, step or attempt; whether they arrive before the fence or after it."""
        wire, remote = bench.link(medium)
        keys = [(1, 9, 9), (2, 4, 9), (2, 5, 0), (2, 5, 1), (2, 6, 0), (3, 0, 0)]
        if not after_arrival:
            wire.fence(FrameTag(epoch=2, step=5, attempt=1))
        for epoch, step, attempt in keys:
            tag = FrameTag(epoch=epoch, step=step, attempt=attempt, layer=1, micro_batch=1)
            remote.tell("send", (1, tag, (10,), 0))
        if after_arrival:
            become_ready(wire)
            wire.fence(FrameTag(epoch=2, step=5, attempt=1))
        wire.fence(FrameTag(epoch=1))  # a fence never goes down
        assert [wire.recv(soon()).tag.fence_key for _ in range(3)] == keys[3:]
        assert wire.stats.dropped == 3
        assert wire.stats.frames_received == 6

    def test_a_stale_frame_does_not_make_a_wire_ready(self, bench: Bench, medium: Medium) -> None:
        wire, remote = bench.link(medium)
        remote.call("send", (1, FrameTag(epoch=1), (10,), 0))
        become_ready(wire)
        wire.fence(FrameTag(epoch=2))
        assert not wire.ready()
        with pytest.raises(WireTimeout):
            wire.recv(0.0)
        assert wire.stats.dropped == 1

    def test_frames_of_one_step_interleave(self, bench: Bench, medium: Medium) -> None:
        """Neither an older layer nor an older micro-batch makes a frame stale."""
        wire, remote = bench.link(medium)
        wire.fence(FrameTag(epoch=2, step=5, attempt=1, layer=9, micro_batch=9))
        remote.call("send", (1, FrameTag(epoch=2, step=5, attempt=1), (10,), 0))
        assert wire.recv(soon()).tag.layer == 0


class TestThreadsAndWaiting:
    @pytest.mark.parametrize("call", ["recv", "send"])
    def test_close_from_another_thread_wakes_a_waiting_call(self, bench: Bench, medium: Medium, call: str) -> None:
        wire, _ = bench.link(medium)
        raised: list[TransportError] = []
        waits = threading.Event()
        waiter: Any = waiter_of_sends(wire) if call == "send" else wire._waiter  # type: ignore[attr-defined]
        await_ = waiter.wait

        def announced(*arguments: object) -> object:
            waits.set()
            return await_(*arguments)

        waiter.wait = announced

        def work() -> None:
            try:
                if call == "send":
                    send_often(wire, soon())
                wire.recv(soon())
            except TransportError as error:
                raised.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert waits.wait(20)
        start = time.monotonic()
        wire.close()
        wire.close()
        assert time.monotonic() - start < 2.0
        thread.join(20)
        assert [type(error) for error in raised] == [PeerGone]
        assert "at this end" in str(raised[0])
        assert wire.filenos() == ()

    def test_waiting_burns_no_cpu(self, bench: Bench, medium: Medium) -> None:
        wire, _ = bench.link(medium)
        poller = Poller()
        poller.add(wire)
        start = time.thread_time()
        with pytest.raises(WireTimeout):
            wire.recv(soon(0.4))
        assert poller.wait(soon(0.4)) == []
        poller.close()
        assert time.thread_time() - start < 0.01


def test_a_frame_larger_than_the_ring_streams_through_it(bench: Bench) -> None:
    """Of shm alone: nobody else has a ring."""
    wire, remote = bench.link(Medium.SHM, ring_bytes=64 << 10)
    remote.tell("echo", 1)
    parts = parts_of((3 * MIB + 17, 5, MIB), 2)
    wire.send(1, TAG, parts, soon())
    assert [bytes(data_of(part)) for part in wire.recv(soon()).parts] == parts


@pytest.mark.parametrize("stream", [Medium.TCP, Medium.TLS])
def test_small_frames_leave_at_once_and_a_vanished_host_is_found(server: Server, stream: Medium) -> None:
    """Of the network's media alone. Both ends: either host may vanish, a waiting one (probes) or a sending one."""
    for end in server.pair(stream):
        assert isinstance(end, TcpWire)
        option = end._sock.getsockopt
        assert option(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
        end.close()
