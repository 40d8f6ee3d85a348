"""Benches of wires, and the media that each test runs on."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from actors.transport import shm
from actors.transport.base import Medium
from actors.transport.ring import PlainRing
from tests.multiprocess.transport.bench import Bench, Crew
from tests.multiprocess.transport.encrypted import tls_for
from tests.multiprocess.transport.remote import left_behind
from tests.multiprocess.transport.servers import Server
from tests.waiting import until


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    """The processes at the other ends."""
    crew = Crew()
    yield crew
    crew.close()


@pytest.fixture
def bench(crew: Crew) -> Iterator[Bench]:
    """A bench that leaves nothing behind, here and in the peers: no descriptor, thread, process, shared memory."""
    gc.collect()
    before, shared = left_behind(), set(os.listdir("/dev/shm"))
    staff = crew.size
    bench = Bench(crew)
    yield bench
    bench.close()
    until(lambda: threading.active_count() <= before[1], 5.0)  # the double's answering threads end by themselves
    gc.collect()
    descriptors, _, memories = left_behind()
    # fewer are no fault: what an earlier test of this process had closed may go late
    assert descriptors - crew.size <= before[0] - staff, "descriptors were left behind"
    assert memories <= before[2], "shared memory was left mapped"
    assert len(children()) <= crew.size, "processes were left behind"
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if "expertmesh" in name}


def children() -> list[str]:
    """Processes that this thread has started."""
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
        return file.read().split()


PLAIN = "shm without a compiler"
"""Our end of the shared-memory wire in Python alone, the other as it was built."""


def medium_of(request: pytest.FixtureRequest) -> Medium:
    """That of the fixture's parameter."""
    if request.param != PLAIN:
        return Medium(request.param)
    request.getfixturevalue("monkeypatch").setattr(shm, "make_ring", PlainRing)
    return Medium.SHM


@pytest.fixture(params=[*Medium, PLAIN])
def medium(request: pytest.FixtureRequest) -> Medium:
    """Every medium in turn; nccl over the communicator double."""
    return medium_of(request)


FAR = [Medium.SHM, Medium.TCP, Medium.TLS, Medium.NCCL, PLAIN]
"""Without local: its two ends are threads of one process, which are stopped and killed together or not at all."""

STREAMS = [Medium.SHM, Medium.TCP, Medium.TLS, PLAIN]
"""Without local, where a frame is never in pieces; without nccl, whose announcements are such a stream's frames."""


@pytest.fixture(params=FAR)
def far(request: pytest.FixtureRequest) -> Medium:
    """The media between processes, for what only a process can suffer."""
    return medium_of(request)


@pytest.fixture(params=STREAMS)
def stream(request: pytest.FixtureRequest) -> Medium:
    """The media that carry bytes one after the other, for what can happen in the middle of a frame."""
    return medium_of(request)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server and a client, under TLS where the test's ``stream`` is, which leave nothing behind."""
    medium = request.getfixturevalue("stream") if "stream" in request.fixturenames else Medium.TCP
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    server = Server(tls_for(medium))
    yield server
    server.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
