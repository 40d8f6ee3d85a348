"""Two ends that send a payload to and fro: over our wires, and in the plainest ways in which a program can.

The ends of a lane are on a core each, as an attention shard and its router are while both have work: two ends on one
core never run at the same time, and the scheduler would choose between the two as it likes.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from typing import Any

from actors.transport.base import Address, FrameTag, Medium, Wire
from actors.transport.endpoint import Endpoint
from actors.transport.local import local_pair
from actors.transport.tls import WireTls
from benchmarks.transport_peer import NODE, PATIENCE_S, SECRET, Peer, pin

Trip = Callable[[], object]
Certificates = tuple[Path, Path, Path]
"""PEM files: a certificate, its key, and the authority's certificate."""

_TAG = FrameTag(1, 2, 3, 4, 5)


class Lane(ABC):
    """One way to send ``size`` bytes there and back. ``name`` is what the table calls it."""

    name: str

    def burst(self, size: int, count: int) -> list[float]:
        """Seconds of each of ``count`` round trips, after one that is not counted. This thread is pinned meanwhile."""
        free = os.sched_getaffinity(0)
        trip = self.begin(size, count + 1)
        pin(0)
        try:
            trip()
            return [timed(trip) for _ in range(count)]
        finally:
            os.sched_setaffinity(0, free)

    @abstractmethod
    def begin(self, size: int, count: int) -> Trip:
        """Tell the other end that ``count`` payloads of ``size`` bytes come; returns what makes one round trip."""

    @abstractmethod
    def close(self) -> None:
        """End the other end and free everything."""


def timed(trip: Trip) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    trip()
    return time.perf_counter() - start


class Copies(Lane):
    """Not a way to send: four copies in one thread, what a ring costs at least. It is copied into and out of, twice."""

    name = "memcpy x4"

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        source, target = memoryview(bytearray(os.urandom(size))), memoryview(bytearray(size))

        def trip() -> None:
            for _ in range(2):
                target[:] = source
                source[:] = target

        return trip

    def close(self) -> None:
        """See :class:`Lane`."""


class RawLane(Lane):
    """A peer process that runs ``serve``; ``link`` is what it needs to know of our end."""

    def __init__(self, name: str, serve: Callable[..., None], *link: object) -> None:
        self.name = name
        self._peer = Peer(serve, *link)

    def _ask(self, size: int, count: int) -> None:
        self._peer.call((size, count))

    def close(self) -> None:
        """See :class:`Lane`."""
        self._peer.close()


class SocketLane(RawLane):
    """``sendall`` and ``recv_into``; the payload's size is known to both."""

    def __init__(self, name: str, ours: socket.socket, theirs: socket.socket) -> None:
        super().__init__(name, _serve_socket, theirs)
        self._sock = ours
        theirs.close()

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        payload, into = os.urandom(size), memoryview(bytearray(size))
        self._ask(size, count)

        def trip() -> None:
            self._sock.sendall(payload)
            fill(self._sock, into)

        return trip

    def close(self) -> None:
        """See :class:`Lane`."""
        super().close()
        self._sock.close()


def unix_lane() -> SocketLane:
    """Through the kernel, on one machine."""
    return SocketLane("unix socket", *socket.socketpair())


def tcp_lane() -> SocketLane:
    """Over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return SocketLane("tcp socket", ours, theirs)


class PipedLane(RawLane):
    """A peer that also has a pipe each way, of which ``serve`` gets its ends last."""

    def __init__(self, name: str, serve: Callable[..., None], *link: object) -> None:
        their_in, self._out = _pipe()
        self._in, their_out = _pipe()
        super().__init__(name, serve, *link, their_in, their_out)
        their_in.close()
        their_out.close()

    def close(self) -> None:
        """See :class:`Lane`."""
        super().close()
        self._in.close()
        self._out.close()


class PipeLane(PipedLane):
    """The payload itself through a pipe each way."""

    def __init__(self) -> None:
        super().__init__("pipe", _serve_pipe)

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        payload, into = os.urandom(size), memoryview(bytearray(size))
        self._ask(size, count)
        source, target = self._in.fileno(), self._out.fileno()

        def trip() -> None:
            write_all(target, payload)
            read_all(source, into)

        return trip


class MemoryLane(PipedLane):
    """One shared buffer each way, a byte through a pipe as its bell: no framing, no deadline, no ring, no end."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._memory = os.memfd_create("benchmark", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, 2 * largest)
        self._shared = mmap.mmap(self._memory, 2 * largest)
        path = f"/proc/{os.getpid()}/fd/{self._memory}"
        super().__init__("memory + pipe", _serve_memory, path, largest)

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        payload, into = os.urandom(size), memoryview(bytearray(size))
        self._ask(size, count)
        source, target = self._in.fileno(), self._out.fileno()
        view, back = memoryview(self._shared)[:size], memoryview(self._shared)[self._largest :][:size]

        def trip() -> None:
            view[:] = payload
            os.write(target, b"x")
            os.read(source, 1)
            into[:] = back

        return trip

    def close(self) -> None:
        """See :class:`Lane`."""
        super().close()
        os.close(self._memory)


def _pipe() -> tuple[Connection, Connection]:
    """Reading end, writing end: multiprocessing's, because those can be handed to a process."""
    return Pipe(duplex=False)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of it, to a blocking descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_all(fd: int, into: memoryview) -> None:
    """Fill ``into`` from a blocking descriptor."""
    while into:
        count = os.readv(fd, [into])
        if not count:
            raise EOFError
        into = into[count:]


def fill(sock: socket.socket, into: memoryview) -> None:
    """Fill ``into`` from a blocking socket."""
    while into:
        count = sock.recv_into(into)
        if not count:
            raise EOFError
        into = into[count:]


def serve(control: Connection, echo_of: Callable[[Any], Trip]) -> None:
    """In a peer: (size, count), "ready", so many of what ``echo_of(size)`` made, until the benchmark closes its end."""
    pin(1)
    try:
        while True:
            size, count = control.recv()
            echo = echo_of(size)
            control.send("ready")
            for _ in range(count):
                echo()
    except (EOFError, ConnectionError):
        return


def _serve_socket(control: Connection, sock: socket.socket) -> None:
    def echo_of(size: int) -> Trip:
        into = memoryview(bytearray(size))

        def echo() -> None:
            fill(sock, into)
            sock.sendall(into)

        return echo

    serve(control, echo_of)


def _serve_pipe(control: Connection, source: Connection, target: Connection) -> None:
    def echo_of(size: int) -> Trip:
        into = memoryview(bytearray(size))

        def echo() -> None:
            read_all(source.fileno(), into)
            write_all(target.fileno(), into)

        return echo

    serve(control, echo_of)


def _serve_memory(control: Connection, path: str, largest: int, source: Connection, target: Connection) -> None:
    with open(path, "r+b") as file:
        shared = memoryview(mmap.mmap(file.fileno(), 2 * largest))

    def echo_of(size: int) -> Trip:
        own, there, back = memoryview(bytearray(size)), shared[:size], shared[largest:][:size]

        def echo() -> None:
            os.read(source.fileno(), 1)
            own[:] = there
            back[:] = own
            os.write(target.fileno(), b"x")

        return echo

    serve(control, echo_of)


class WireLane(Lane):
    """One frame with one part over a wire of ours; the other end sends the same parts back."""

    def __init__(self, medium: Medium, spin_us: float, certificates: Certificates | None = None) -> None:
        """``certificates``: for the medium TLS, which needs them."""
        self.name = medium.value
        wires: Queue[Wire] = Queue()
        tls = WireTls(*certificates) if certificates else None
        endpoint = Endpoint("here", NODE, SECRET, on_wire=wires.put, spin_us=spin_us, tls=tls)
        self._peer = Peer(_serve_wire, endpoint.address, medium, spin_us, certificates)
        self.wire = wires.get(timeout=PATIENCE_S)
        endpoint.close()

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        self._peer.call((size, count))
        return frame_trip(self.wire, size)

    def close(self) -> None:
        """See :class:`Lane`."""
        self._peer.close()
        self.wire.close()


class LocalLane(Lane):
    """The reference wire, between two threads."""

    name = "local (threads)"

    def __init__(self, spin_us: float) -> None:
        self.wire, theirs = local_pair("here", "there", spin_us)
        self._control, their_control = Pipe()
        self._thread = threading.Thread(target=serve, args=(their_control, lambda size: frame_echo(theirs)))
        self._thread.start()

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        self._control.send((size, count))
        self._control.recv()
        return frame_trip(self.wire, size)

    def close(self) -> None:
        """See :class:`Lane`."""
        self._control.close()
        self._thread.join()
        self.wire.close()


def frame_trip(wire: Wire, size: int) -> Trip:
    """Send a payload in a frame, receive one."""
    parts = (os.urandom(size),)

    def trip() -> None:
        deadline = time.monotonic() + PATIENCE_S
        wire.send(1, _TAG, parts, deadline)
        wire.recv(deadline)

    return trip


def frame_echo(wire: Wire) -> Trip:
    """Receive a frame, send its parts."""

    def echo() -> None:
        deadline = time.monotonic() + PATIENCE_S
        frame = wire.recv(deadline)
        wire.send(frame.kind, frame.tag, frame.parts, deadline)

    return echo


def _serve_wire(
    control: Connection, address: Address, medium: Medium, spin_us: float, certificates: Certificates | None
) -> None:
    tls = WireTls(*certificates) if certificates else None
    endpoint = Endpoint("there", NODE, SECRET, spin_us=spin_us, tls=tls)
    wire = endpoint.connect(address, time.monotonic() + PATIENCE_S, medium)
    serve(control, lambda size: frame_echo(wire))
    wire.close()
    endpoint.close()
