"""The other end of a wire under test: a small interpreter of commands, in a thread or in a worker's process."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actors.transport.base import Address, Buffer, FrameTag, Medium, Part, TransportError, Wire
from actors.transport.endpoint import Endpoint
from actors.transport.frame import HEADER_BYTES
from actors.transport.nccl import NcclWire
from actors.transport.nccl_group import GroupPlan, NcclGroup
from actors.transport.nccl_join import join_as_router
from actors.transport.ring import PlainRing
from actors.transport.shm import ShmWire
from actors.transport.stream import StreamWire
from tests.multiprocess.peers import Peer
from tests.multiprocess.transport.encrypted import tls_for
from tests.multiprocess.transport.nccl_double import DoubleBackend

SECRET = b"a secret of the tests"
NODE = "node-0"
HERE = "here"
PATIENCE = 20.0

_NOISE = random.Random(7).randbytes((1 << 20) + 251)

Shape = tuple[int, FrameTag, tuple[int, ...], int]
"""kind, tag, the parts' sizes in bytes, seed of their contents."""

Digest = tuple[int, FrameTag, tuple[tuple[int, int], ...]]
"""kind, tag, (size, crc32) of each part."""


class Point(StrEnum):
    """Where in the sending of a frame a process is killed."""

    HEADER = "in the header (nccl: in the announcement)"
    COUNTS = "between the counts and the payload"
    PAYLOAD = "in the middle of the payload"
    SENT = "after the send has returned"


def soon(seconds: float = PATIENCE) -> float:
    """A deadline so many seconds from now."""
    return time.monotonic() + seconds


def payload(size: int, seed: int) -> bytes:
    """``size`` bytes that differ from seed to seed and do not repeat with any power of two."""
    start = seed * 7919 % 65521
    if start + size <= len(_NOISE):
        return _NOISE[start : start + size]
    rotated = _NOISE[start:] + _NOISE[:start]
    return (rotated * (size // len(rotated) + 1))[:size]


def parts_of(sizes: tuple[int, ...], seed: int) -> list[bytes]:
    """One part per size."""
    return [payload(size, seed + index) for index, size in enumerate(sizes)]


def carried(wire: Wire, parts: Sequence[bytes]) -> list[Buffer | Tensor]:
    """The parts as what this wire is for: tensors over nccl, memory over the others."""
    if wire.medium is not Medium.NCCL:
        return list(parts)
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.empty(0) for part in parts]


def data_of(part: Part) -> memoryview:
    """The bytes of a received part, wherever they lie."""
    return part.numpy().data if isinstance(part, Tensor) else part


def digest(kind: int, tag: FrameTag, parts: Sequence[Any]) -> Digest:
    """What two ends compare."""
    return kind, tag, tuple((len(part), zlib.crc32(data_of(part))) for part in parts)


def send_shape(wire: Wire, shape: Shape, seconds: float = PATIENCE) -> Digest:
    """Make and send one frame; its digest."""
    kind, tag, sizes, seed = shape
    parts = parts_of(sizes, seed)
    wire.send(kind, tag, carried(wire, parts), soon(seconds))
    return digest(kind, tag, parts)


def recv_digest(wire: Wire, seconds: float = PATIENCE) -> Digest:
    """Receive one frame; its digest."""
    frame = wire.recv(soon(seconds))
    return digest(frame.kind, frame.tag, frame.parts)


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def cut_sending(wire: StreamWire, at: int, cut: Callable[[], None]) -> None:
    """Have ``cut`` called once ``at`` bytes, to the byte, of what this wire sends from now on are out.

    All of it goes the general way: a frame that goes in one call is announced at once, so nobody sees it cut."""
    if isinstance(wire, ShmWire):
        ring = wire._out
        wire._out = PlainRing(ring.memory, ring.data_bell, ring.space_bell, ring.known, ring.position)
    push, left = wire._push, at

    def cutting(outgoing: deque[memoryview]) -> bool:
        nonlocal left
        if left <= 0:
            cut()
        first = outgoing.popleft()
        piece = deque([first[:left]])
        moved = push(piece)
        rest = first[min(left, len(first)) - sum(map(len, piece)) :]
        left -= len(first) - len(rest)
        if rest:
            outgoing.appendleft(rest)
        if left <= 0:
            cut()
        return moved

    wire._push = cutting  # type: ignore[method-assign]


def die() -> None:
    """kill -9 this process."""
    os.kill(os.getpid(), signal.SIGKILL)


class _Commands:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def echo(self, count: int, pause_s: float = 0.0) -> None:
        for _ in range(count):
            frame = self.wire.recv(soon())
            time.sleep(pause_s)
            self.wire.send(frame.kind, frame.tag, frame.parts, soon())

    def send(self, shape: Shape, seconds: float = PATIENCE) -> Digest:
        return send_shape(self.wire, shape, seconds)

    def recv(self, seconds: float = PATIENCE) -> Digest:
        return recv_digest(self.wire, seconds)

    def swap(self, shape: Shape) -> tuple[Digest, Digest]:
        """Send first, then receive: what the other end does as well."""
        return send_shape(self.wire, shape), recv_digest(self.wire)

    def close(self) -> None:
        self.wire.close()

    def resident(self) -> int:
        return resident_bytes()

    def die_sending(self, point: Point, shape: Shape) -> None:
        """kill -9 this process at this point of sending the frame."""
        if isinstance(self.wire, NcclWire):
            _die_sending_tensors(self.wire, point, sum(shape[2]))
        elif point is not Point.SENT:
            assert isinstance(self.wire, StreamWire)
            at = {Point.HEADER: 30, Point.COUNTS: HEADER_BYTES, Point.PAYLOAD: HEADER_BYTES + sum(shape[2]) // 2}
            cut_sending(self.wire, at[point], die)
        send_shape(self.wire, shape)
        if point is Point.SENT:
            die()
        self.wire.recv(soon())

    def die_receiving(self, size: int) -> None:
        """kill -9 this process once ``size`` bytes have come in (nccl: when it is told that they will)."""
        wire = self.wire
        if isinstance(wire, NcclWire):
            wire._group.receive = lambda *_: die()  # type: ignore[assignment, method-assign, return-value]
            wire.recv(soon())
        assert isinstance(wire, StreamWire)
        pull, taken = wire._pull, 0

        def dying(target: memoryview) -> int:
            nonlocal taken
            count = pull(target)
            taken += count
            if taken >= size:
                die()
            return count

        wire._pull = dying  # type: ignore[method-assign]
        wire.recv(soon())


def _die_sending_tensors(wire: NcclWire, point: Point, size: int) -> None:
    group: Any = wire._group
    if point is Point.HEADER:
        assert isinstance(wire._companion, StreamWire)
        cut_sending(wire._companion, 30, die)
    elif point is Point.COUNTS:
        group._post_batch = die
    elif point is Point.PAYLOAD:
        _cut_payload(group._outgoing, size // 2)


def _cut_payload(communicator: Any, half: int) -> None:
    """kill -9 this process once the first half of a large transfer is out."""
    write, cut = communicator._write, False

    def cutting(link: Any) -> bool:
        nonlocal cut
        for at, (view, _) in enumerate(link.outgoing):
            if len(view) > half:
                cut = True
                kept = list(link.outgoing)[:at]
                link.outgoing = deque([*kept, (view[:half], None)])
                break
        moved: bool = write(link)
        if cut and not link.outgoing:
            die()
        return moved

    communicator._write = cutting


class Job(NamedTuple):
    """The wire that a worker is to make: to ``address``, over ``medium``, inside the group of ``plan`` for nccl, with
    the files in ``certificates`` for TLS."""

    name: str
    address: Address
    medium: Medium
    ring_bytes: int
    plan: GroupPlan | None = None
    certificates: Path | None = None


def obey(connection: Connection, wire: Wire) -> None:
    """Carry out (command, *arguments) until ("over",) or the pipe's end; answer with the result or the error's name."""
    commands = _Commands(wire)
    # The test may be over in the middle of a command: then nobody listens to its result any more.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            name, *arguments = connection.recv()
            if name == "over":
                break
            try:
                result = getattr(commands, name)(*arguments)
            except TransportError as error:
                result = type(error).__name__
            connection.send(result)
    wire.close()


def run_worker(connection: Connection) -> None:
    """In a worker's process: one job after the other. After each, tell what it has left behind."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            job: Job = connection.recv()
            before = left_behind()
            _work(connection, job)
            gc.collect()
            connection.send(("left", before, left_behind()))


def _work(connection: Connection, job: Job) -> None:
    tls = tls_for(job.medium, job.certificates)
    endpoint = Endpoint(job.name, NODE, SECRET, ring_bytes=job.ring_bytes, tls=tls)
    wire, group = _made(job, endpoint)
    obey(connection, wire)
    if group is not None:
        group.close()
    endpoint.close()


def run_mute(connection: Connection, job: Job) -> None:
    """In a process that will be killed: connect, and say nothing, not even the hello."""
    if job.plan is not None:
        wire = Endpoint(job.name, NODE, SECRET).connect(job.address, soon(), Medium.SHM)
        assert wire.peer == HERE
    elif job.medium is Medium.SHM:
        bare = socket.socket(socket.AF_UNIX)
        bare.connect("\0" + job.address.unix_name)
    else:
        bare = socket.create_connection((job.address.host, job.address.port))
    connection.send("connected")
    connection.recv()


def left_behind() -> tuple[int, int, int]:
    """Descriptors, threads and shared memories that this process has."""
    with open("/proc/self/maps") as maps:
        shared = sum("memfd:expertmesh" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), shared


def _made(job: Job, endpoint: Endpoint) -> tuple[Wire, NcclGroup | None]:
    if job.plan is None:
        return endpoint.connect(job.address, soon(), job.medium), None
    joined = join_as_router(job.plan, job.name, endpoint, {HERE: job.address}, DoubleBackend(), soon(), None, PATIENCE)
    return joined.wires[HERE], joined.group


class Remote:
    """Our handle on the other end: ``tell`` it to do something, ``hear`` what came of it."""

    def __init__(self, peer: Peer | Connection, thread: threading.Thread | None = None) -> None:
        self._peer = peer
        self._thread = thread

    @property
    def process(self) -> Peer:
        """The peer's process (not for local wires)."""
        assert isinstance(self._peer, Peer)
        return self._peer

    def tell(self, command: str, *arguments: Any) -> None:
        """Start a command."""
        self._peer.send((command, *arguments))

    def hear(self) -> Any:
        """Result of the oldest command not heard yet: its value, or the name of the TransportError it raised."""
        if isinstance(self._peer, Peer):
            return self._peer.recv()
        assert self._peer.poll(PATIENCE), "the peer thread said nothing"
        return self._peer.recv()

    def call(self, command: str, *arguments: Any) -> Any:
        """tell and hear."""
        self.tell(command, *arguments)
        return self.hear()

    def end(self) -> Peer | None:
        """Take the wire down, at the other end, and see that nothing is left of it; its process, if that lives."""
        if isinstance(self._peer, Peer):
            return self._ended_worker(self._peer)
        self._peer.close()
        assert self._thread is not None
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return None

    def _ended_worker(self, worker: Peer) -> Peer | None:
        try:
            worker.send(("over",))
            while True:
                told = worker.recv()
                if isinstance(told, tuple) and told[0] == "left":
                    break
        except (EOFError, ConnectionError):
            worker.close()  # it was killed in the test
            return None
        except TimeoutError:
            worker.close()
            raise
        if told[1] != told[2]:
            worker.close()
            raise AssertionError(f"the peer had (descriptors, threads, shared memories) {told[1]}, and has {told[2]}")
        return worker


def in_thread(connect: Callable[[], Wire]) -> Remote:
    """A remote in a thread of this process, over the wire that ``connect`` makes."""
    ours, theirs = Pipe()

    def run() -> None:
        with theirs:
            obey(theirs, connect())

    thread = threading.Thread(target=run, name="remote")
    thread.start()
    return Remote(ours, thread)
