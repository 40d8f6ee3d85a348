"""The other end of a wire under test: a small interpreter of commands, in a thread or in a process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from actors.transport.base import Address, FrameTag, Medium, TransportError, Wire
from actors.transport.endpoint import Endpoint
from actors.transport.stream import StreamWire
from tests.multiprocess.peers import Peer
from tests.multiprocess.transport.encrypted import folder, tls_for

SECRET = b"a secret of the tests"
NODE = "node-0"
PATIENCE = 20.0

_NOISE = random.Random(7).randbytes((1 << 20) + 251)

Shape = tuple[int, FrameTag, tuple[int, ...], int]
"""kind, tag, the parts' sizes in bytes, seed of their contents."""

Digest = tuple[int, FrameTag, tuple[tuple[int, int], ...]]
"""kind, tag, (size, crc32) of each part."""


def soon(seconds: float = PATIENCE) -> float:
    """A deadline so many seconds from now."""
    return time.monotonic() + seconds


def payload(size: int, seed: int) -> bytes:
    """``size`` bytes that differ from seed to seed and do not repeat with any power of two."""
    start = seed * 7919 % 65521
    rotated = _NOISE[start:] + _NOISE[:start]
    return (rotated * (size // len(rotated) + 1))[:size]


def parts_of(sizes: tuple[int, ...], seed: int) -> list[bytes]:
    """One part per size."""
    return [payload(size, seed + index) for index, size in enumerate(sizes)]


def digest(kind: int, tag: FrameTag, parts: Any) -> Digest:
    """What two ends compare."""
    return kind, tag, tuple((len(part), zlib.crc32(part)) for part in parts)


def send_shape(wire: Wire, shape: Shape, seconds: float = PATIENCE) -> Digest:
    """Make and send one frame; its digest."""
    kind, tag, sizes, seed = shape
    parts = parts_of(sizes, seed)
    wire.send(kind, tag, parts, soon(seconds))
    return digest(kind, tag, parts)


def recv_digest(wire: Wire, seconds: float = PATIENCE) -> Digest:
    """Receive one frame; its digest."""
    frame = wire.recv(soon(seconds))
    return digest(frame.kind, frame.tag, frame.parts)


class _Commands:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def echo(self, count: int) -> None:
        for _ in range(count):
            frame = self.wire.recv(soon())
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

    def die_sending(self, shape: Shape) -> None:
        """kill -9 this process once half of the frame is out."""
        wire = self.wire
        assert isinstance(wire, StreamWire)
        push, half = wire._push, sum(shape[2]) // 2

        def dying(outgoing: Any) -> bool:
            if sum(map(len, outgoing)) <= half:
                os.kill(os.getpid(), signal.SIGKILL)
            return push(outgoing)

        wire._push = dying  # type: ignore[method-assign]
        send_shape(wire, shape)

    def die_receiving(self, size: int) -> None:
        """kill -9 this process once ``size`` bytes have come in."""
        wire = self.wire
        assert isinstance(wire, StreamWire)
        pull, taken = wire._pull, 0

        def dying(target: memoryview) -> int:
            nonlocal taken
            count = pull(target)
            taken += count
            if taken >= size:
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        wire._pull = dying  # type: ignore[method-assign]
        wire.recv(soon())


def obey(connection: Connection, wire: Wire) -> None:
    """Carry out (command, *arguments) until the pipe ends; answer with the result or the error's name."""
    commands = _Commands(wire)
    # The test may be over in the middle of a command: then nobody listens to its result any more.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            name, *arguments = connection.recv()
            try:
                result = getattr(commands, name)(*arguments)
            except TransportError as error:
                result = type(error).__name__
            connection.send(result)
    wire.close()


def run_process(
    connection: Connection, name: str, address: Address, medium: Medium, ring_bytes: int, certificates: Path
) -> None:
    """In the peer process: connect, then obey."""
    endpoint = Endpoint(name, NODE, SECRET, ring_bytes=ring_bytes, tls=tls_for(medium, certificates))
    obey(connection, endpoint.connect(address, soon(), medium))
    endpoint.close()


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

    def close(self) -> None:
        """End it; a thread is joined, a process killed and reaped."""
        self._peer.close()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive()


def in_thread(connect: Callable[[], Wire]) -> Remote:
    """A remote in a thread of this process, over the wire that ``connect`` makes."""
    ours, theirs = Pipe()

    def run() -> None:
        with theirs:
            obey(theirs, connect())

    thread = threading.Thread(target=run, name="remote")
    thread.start()
    return Remote(ours, thread)


def in_process(name: str, address: Address, medium: Medium, ring_bytes: int) -> Remote:
    """A remote in a process of its own, connected to ``address``."""
    run = "tests.multiprocess.transport.remote:run_process"
    return Remote(Peer(run, name, address, medium, ring_bytes, folder()))
