"""Waiting on several wires, of one medium and of all of them."""

from __future__ import annotations

import threading
import time

import pytest

from actors.transport.base import FrameTag, Medium, PeerGone
from actors.transport.poller import Poller
from tests.multiprocess.transport.bench import Bench
from tests.multiprocess.transport.remote import Digest, carried, recv_digest, soon
from tests.waiting import until

TAG = FrameTag()


def test_tells_which_wires_have_frames(bench: Bench, medium: Medium) -> None:
    links = [bench.link(medium, f"peer-{index}") for index in range(3)]
    poller = Poller()
    for link in links:
        poller.add(link.wire)
    assert poller.wait(0.0) == []
    links[2].remote.call("send", (1, TAG, (10,), 0))
    assert poller.wait(soon()) == [links[2].wire]
    assert poller.wait(soon()) == [links[2].wire], "still not received"
    links[0].remote.call("send", (1, TAG, (10,), 0))
    until(links[0].wire.ready)
    assert set(poller.wait(soon())) == {links[0].wire, links[2].wire}
    links[2].wire.recv(0.0)
    assert poller.wait(soon()) == [links[0].wire]
    links[0].wire.recv(0.0)
    assert poller.wait(soon(0.05)) == []
    poller.close()


def test_media_mix(bench: Bench) -> None:
    links = [bench.link(medium, medium.value) for medium in Medium]
    poller = Poller()
    for link in links:
        poller.add(link.wire)
        link.remote.tell("echo", 50)
    for step in range(50):
        for link in links:
            link.wire.send(1, FrameTag(step=step), carried(link.wire, [b"x" * 3000]), soon())
        waiting = {link.wire for link in links}
        while waiting:
            for wire in poller.wait(soon()):
                assert wire.recv(0.0).tag.step == step
                waiting.remove(wire)
    poller.close()


def test_several_frames_in_one_wire_are_each_told(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    poller = Poller()
    poller.add(wire)
    for step in range(5):
        remote.tell("send", (1, FrameTag(step=step), (100,), step))
    received: list[Digest] = []
    while len(received) < 5:
        assert poller.wait(soon()) == [wire]
        received.append(recv_digest(wire, 0.0))
    assert received == [remote.hear() for _ in received]
    assert poller.wait(0.0) == []
    poller.close()


def test_frames_taken_in_by_a_send_are_told(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    poller = Poller()
    poller.add(wire)
    remote.tell("swap", (1, TAG, (16 << 20,), 3))
    wire.send(1, TAG, carried(wire, [bytes(16 << 20)]), soon())
    assert poller.wait(soon()) == [wire]
    remote.hear()
    recv_digest(wire, 0.0)
    poller.close()


def test_part_of_a_frame_is_not_a_frame(bench: Bench, far: Medium) -> None:
    wire, remote = bench.link(far)
    poller = Poller()
    poller.add(wire)
    remote.tell("send", (1, TAG, (32 << 20,), 1))
    assert poller.wait(soon()) == [wire]
    assert recv_digest(wire, 0.0) == remote.hear()
    poller.close()


def test_the_end_of_a_peer_is_told(bench: Bench, medium: Medium) -> None:
    (wire, remote), (other, _) = bench.link(medium, "a"), bench.link(medium, "b")
    poller = Poller()
    poller.add(wire)
    poller.add(other)
    remote.call("close")
    assert poller.wait(soon()) == [wire]
    with pytest.raises(PeerGone):
        wire.recv(0.0)
    poller.remove(wire)
    assert poller.wait(soon(0.05)) == []
    poller.close()


def test_kill_of_a_peer_is_told(bench: Bench, far: Medium) -> None:
    wire, remote = bench.link(far)
    poller = Poller()
    poller.add(wire)
    remote.process.kill()
    assert poller.wait(soon()) == [wire]
    poller.close()


def test_a_wire_closed_here_is_told_and_can_be_removed(bench: Bench, medium: Medium) -> None:
    wire, remote = bench.link(medium)
    poller = Poller()
    poller.add(wire)
    closer = threading.Timer(0.1, wire.close)
    closer.start()
    assert poller.wait(soon()) == [wire]
    closer.join()
    poller.remove(wire)
    assert remote.call("recv") == "PeerGone"
    start = time.thread_time()
    assert poller.wait(soon(0.2)) == []
    assert time.thread_time() - start < 0.02, "a closed wire keeps the poller spinning"
    poller.close()


def test_wake_ends_a_wait_now_or_the_next_one() -> None:
    poller = Poller()
    start = time.monotonic()
    waker = threading.Timer(0.1, poller.wake)
    waker.start()
    assert poller.wait(start + 20) == []
    waker.join()
    poller.wake()
    poller.wake()
    assert poller.wait(start + 20) == []
    assert time.monotonic() - start < 5.0
    begin = time.monotonic()
    assert poller.wait(begin + 0.1) == []
    assert time.monotonic() - begin >= 0.1, "two wakes are one"
    poller.close()
    poller.close()
    poller.wake()


def test_adding_twice_and_removing_a_stranger_are_errors(bench: Bench) -> None:
    wire, _ = bench.link(Medium.LOCAL)
    poller = Poller()
    poller.add(wire)
    with pytest.raises(ValueError, match="already"):
        poller.add(wire)
    poller.remove(wire)
    with pytest.raises(ValueError, match="not in"):
        poller.remove(wire)
    poller.close()
