"""A bench of wires: our end here, the other end in a thread (local) or a process of its own (shm, tcp)."""

from __future__ import annotations

import gc
import os
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from actors.transport.base import Medium, Wire
from actors.transport.endpoint import Endpoint
from actors.transport.local import LocalNetwork
from tests.multiprocess.transport.encrypted import tls_for
from tests.multiprocess.transport.remote import NODE, PATIENCE, SECRET, Remote, in_process, in_thread, soon
from tests.multiprocess.transport.servers import Server


class Link(NamedTuple):
    """Our end of a wire, and whoever is at the other."""

    wire: Wire
    remote: Remote


class Bench:
    """Makes links and takes all of them down again."""

    def __init__(self) -> None:
        self._wires: queue.Queue[Wire] = queue.Queue()
        self._endpoint = Endpoint("here", NODE, SECRET, on_wire=self._wires.put)
        self._encrypted = Endpoint("here", NODE, SECRET, on_wire=self._wires.put, tls=tls_for(Medium.TLS))
        self._network = LocalNetwork()
        self._local = self._network.endpoint("here", self._wires.put)
        self._links: list[Link] = []

    def link(self, medium: Medium, name: str = "there", ring_bytes: int = 4 << 20) -> Link:
        """A new wire of this medium to a new remote called ``name``."""
        if medium is Medium.LOCAL:
            other = self._network.endpoint(name)
            remote = in_thread(lambda: other.connect(self._local.address, soon()))
        else:
            endpoint = self._encrypted if medium is Medium.TLS else self._endpoint
            remote = in_process(name, endpoint.address, medium, ring_bytes)
        link = Link(self._wires.get(timeout=PATIENCE), remote)
        self._links.append(link)
        assert link.wire.peer == name
        assert link.wire.medium is medium
        return link

    def close(self) -> None:
        """Every wire, remote and endpoint."""
        for link in self._links:
            link.wire.close()
            link.remote.close()
        self._endpoint.close()
        self._encrypted.close()
        self._local.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench that leaves nothing behind: no descriptor, no thread, nothing in /dev/shm."""
    gc.collect()
    before = (len(os.listdir("/proc/self/fd")), threading.active_count(), set(os.listdir("/dev/shm")))
    bench = Bench()
    yield bench
    bench.close()
    after = (len(os.listdir("/proc/self/fd")), threading.active_count(), set(os.listdir("/dev/shm")))
    # fewer are no fault: what an earlier test of this process had closed may go late
    assert after[0] <= before[0], "descriptors were left behind"
    assert after[1] <= before[1], "threads were left behind"
    assert not {name for name in after[2] - before[2] if "expertmesh" in name}


@pytest.fixture(params=[Medium.LOCAL, Medium.SHM, Medium.TCP, Medium.TLS])
def medium(request: pytest.FixtureRequest) -> Medium:
    """Every pairwise medium in turn (an nccl wire has a group around it: see test_nccl.py)."""
    return Medium(request.param)


@pytest.fixture(params=[Medium.SHM, Medium.TCP, Medium.TLS])
def far(request: pytest.FixtureRequest) -> Medium:
    """The media between processes, for what only a process can suffer."""
    return Medium(request.param)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server and a client, which leave nothing behind."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    server = Server()
    yield server
    server.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
