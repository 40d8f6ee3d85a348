"""What the data-plane thread counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from actors.loop import LoopThread
from actors.transport.base import FrameTag, Wire
from actors.transport.local import LocalNetwork
from tests.waiting import until


@pytest.fixture
def network() -> LocalNetwork:
    return LocalNetwork()


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    """One whose wires' frames nobody wants."""
    made = LoopThread("router-0", lambda wire, frame: None, lambda wire, error: None)
    made.start()
    yield made
    made.stop()


def connect(network: LocalNetwork, loop: LoopThread, name: str) -> tuple[Wire, Wire]:
    """A wire of the loop, and its other end."""
    there: list[Wire] = []
    peer = network.endpoint(name, there.append)
    wire = network.endpoint(f"of-{name}", lambda wire: None).connect(peer.address, time.monotonic() + 20)
    loop.add(wire)
    until(lambda: wire in loop.wires() and bool(there))
    return wire, there[0]


def send(wire: Wire, size: int) -> None:
    wire.send(1, FrameTag(), [bytes(size)], time.monotonic() + 20)


def test_bytes_of_wires_that_have_ended_still_count(network: LocalNetwork, loop: LoopThread) -> None:
    first, far = connect(network, loop, "expert-0")
    second, _ = connect(network, loop, "expert-1")
    send(first, 1000)
    send(second, 50)
    sent = loop.bytes_sent()
    assert sent == {"local": first.stats.bytes_sent + second.stats.bytes_sent}
    assert sent["local"] >= 1050

    far.close()
    until(lambda: loop.wires() == [second])
    assert loop.bytes_sent() == sent
    third, _ = connect(network, loop, "expert-2")
    send(third, 7)
    assert loop.bytes_sent() == {"local": sent["local"] + third.stats.bytes_sent}


def test_threads_that_begin_after_it_was_made_take_its_number_of_torch_threads_over() -> None:
    """Those that read weights before it is started would take as many as the machine has cores, each of them."""
    before, seen = torch.get_num_threads(), list[int]()
    try:
        made = LoopThread("expert-0", lambda wire, frame: None, lambda wire, error: None, threads=before + 1)
        reader = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        reader.start()
        reader.join()
        made.stop()
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]


@pytest.mark.parametrize("threads", [0, 1])
def test_handlers_that_compute_record_no_gradients(network: LocalNetwork, threads: int) -> None:
    before, seen = torch.get_num_threads(), list[bool]()
    made = LoopThread(
        "expert-0",
        lambda wire, frame: seen.append(torch.is_inference_mode_enabled()),
        lambda wire, error: None,
        threads=threads,
    )
    torch.set_num_threads(before)
    made.start()
    try:
        _, far = connect(network, made, "router-0")
        send(far, 1)
        until(lambda: bool(seen))
    finally:
        made.stop()
    assert seen == [threads > 0]
