"""The wire inside one process, and the network that makes such wires: the oracle for the other media.

Frames are copied, queued and limited as between processes, but by the plainest means: two queues under one
lock. An end's two eventfds are rung under that lock and hushed under it only when there is nothing left to
tell, so that being readable means the same as the condition they stand for.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.transport.base import (
    MAX_BACKLOG_BYTES,
    Address,
    Buffer,
    FrameTag,
    HandshakeRefused,
    Medium,
    PeerGone,
    Wire,
    WireTimeout,
)
from actors.transport.blocks import Block, BlockPool, footprint
from actors.transport.frame import HEADER_BYTES, byte_view, encode_header
from actors.transport.handshake import name_bytes
from actors.transport.inbox import InboxWire
from actors.transport.stream import poll_on

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_BYTES = 4 << 20
"""What may wait in one direction before a sender has to; a larger frame passes when nothing waits."""

_Queued = tuple[int, FrameTag, tuple[memoryview, ...], Block, int]


def _bell() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


@dataclass
class _Side:
    """What arrives at one end, and its bells. Guarded by the pair's lock."""

    arrival: int = field(default_factory=_bell)
    room: int = field(default_factory=_bell)
    queue: deque[_Queued] = field(default_factory=deque)
    waiting_bytes: int = 0
    open: bool = True
    pool: BlockPool = field(default_factory=BlockPool)

    def ring(self, bell: int) -> None:
        if self.open:
            os.eventfd_write(bell, 1)

    def ring_all(self) -> None:
        self.ring(self.arrival)
        self.ring(self.room)


class LocalWire(InboxWire):
    """One end of a pair made by :func:`local_pair`."""

    def __init__(self, peer: str, own: _Side, other: _Side, lock: threading.Lock, spin_us: float) -> None:
        super().__init__(peer, Medium.LOCAL, spin_us)
        self._own = own
        self._other = other
        self._lock = lock
        self._pool = own.pool
        self._poll_recv = poll_on((own.arrival,))
        self._poll_send = poll_on((own.arrival, own.room))
        self._poll_room = poll_on((own.room,))

    def send(self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], deadline: float) -> None:
        """See :meth:`Wire.send`."""
        views = [byte_view(part) for part in parts]
        lengths = [len(view) for view in views]
        encode_header(kind, tag, lengths)  # for its limits, which hold for every medium
        timed_out = False
        with self._use:
            while not self._offered(kind, tag, views, lengths):
                hungry = self._backlog < MAX_BACKLOG_BYTES
                if hungry and self._take_in():
                    continue
                if not self._waiter.wait(self._poll_send if hungry else self._poll_room, deadline):
                    timed_out = True
                    break
        if timed_out:
            self.close()
            raise WireTimeout(f"{self.peer!r} made no room for a frame over local before the deadline")

    def filenos(self) -> tuple[int, ...]:
        """See :meth:`Wire.filenos`."""
        return () if self._freed else (self._own.arrival,)

    def _offered(self, kind: int, tag: FrameTag, views: list[memoryview], lengths: list[int]) -> bool:
        size = HEADER_BYTES + sum(lengths)
        side = self._other
        with self._lock:
            self._require_open()
            if not side.open:
                raise PeerGone(f"{self.peer!r} closed its local wire")
            if side.waiting_bytes and side.waiting_bytes + size > WINDOW_BYTES:
                _hush(self._own.room)
                return False
            block = side.pool.take(footprint(lengths))
            parts = block.split(lengths)
            for part, view in zip(parts, views, strict=True):
                part[:] = view
            side.queue.append((kind, tag, parts, block, size))
            side.waiting_bytes += size
            side.ring(side.arrival)
        self._counted.frames_sent += 1
        self._counted.bytes_sent += size
        return True

    def _take_in(self) -> bool:
        with self._lock:
            if not self._own.queue:
                _hush(self._own.arrival)
                if not self._other.open:
                    self._set_end(PeerGone, f"{self.peer!r} closed its local wire")
                return False
            kind, tag, parts, block, size = self._own.queue.popleft()
            self._own.waiting_bytes -= size
            self._other.ring(self._other.room)
        self._arrived(kind, tag, parts, block, size)
        return True

    def _await(self, deadline: float) -> bool:
        return bool(self._waiter.wait(self._poll_recv, deadline))

    def _look_for_end(self) -> None:
        """Nothing to do: ``_take_in`` has met the end if it is there."""

    def _give_back(self, block: Block) -> None:
        with self._lock:
            self._pool.give(block)

    def _interrupt(self) -> None:
        with self._lock:
            self._own.ring_all()

    def _free(self) -> None:
        with self._lock:
            self._own.open = False
            self._own.queue.clear()
            self._other.ring_all()
            os.close(self._own.arrival)
            os.close(self._own.room)


def _hush(bell: int) -> None:
    try:
        os.eventfd_read(bell)
    except BlockingIOError:
        return


def local_pair(first: str, second: str, spin_us: float = 50.0) -> tuple[LocalWire, LocalWire]:
    """The two ends of a wire: the one that ``first`` holds (its ``peer`` is ``second``), and the other."""
    sides, lock = (_Side(), _Side()), threading.Lock()
    return (
        LocalWire(second, sides[0], sides[1], lock, spin_us),
        LocalWire(first, sides[1], sides[0], lock, spin_us),
    )


class LocalNetwork:
    """Endpoints of one process that find each other by name. Thread-safe."""

    def __init__(self, spin_us: float = 50.0) -> None:
        self._spin_us = spin_us
        self._lock = threading.Lock()
        self._endpoints: dict[str, LocalEndpoint] = {}

    def endpoint(self, name: str, on_wire: Callable[[Wire], None] | None = None) -> LocalEndpoint:
        """A new endpoint; ``on_wire`` as in :class:`~.endpoint.Endpoint`. Errors: ValueError (name taken or
        unfit).
        """
        name_bytes(name)
        with self._lock:
            if name in self._endpoints:
                raise ValueError(f"endpoint name {name!r} is taken in this network")
            endpoint = LocalEndpoint(name, on_wire, self)
            self._endpoints[name] = endpoint
        return endpoint

    def _connect(self, caller: str, name: str) -> Wire:
        with self._lock:
            target = self._endpoints.get(name)
        if target is None:
            raise PeerGone(f"no endpoint named {name!r} in this network")
        if target.on_wire is None:
            raise HandshakeRefused(f"{name!r} accepts no wires")
        mine, theirs = local_pair(caller, name, self._spin_us)
        target.on_wire(theirs)
        return mine

    def _forget(self, endpoint: LocalEndpoint) -> None:
        with self._lock:
            if self._endpoints.get(endpoint.address.name) is endpoint:
                del self._endpoints[endpoint.address.name]


class LocalEndpoint:
    """An :class:`~.base.EndpointLike` of a LocalNetwork. ``on_wire`` runs in the connecting thread."""

    def __init__(self, name: str, on_wire: Callable[[Wire], None] | None, network: LocalNetwork) -> None:
        self.on_wire = on_wire
        self._address = Address(name=name, node_id="local")
        self._network = network

    @property
    def address(self) -> Address:
        """See :class:`~.base.EndpointLike`."""
        return self._address

    def connect(self, address: Address, deadline: float, medium: Medium | None = None) -> Wire:
        """See :class:`~.base.EndpointLike`. Never waits."""
        if medium not in (None, Medium.LOCAL):
            raise HandshakeRefused(f"medium {medium} to {address.name!r}: a local network has only local wires")
        return self._network._connect(self._address.name, address.name)

    def close(self) -> None:
        """See :class:`~.base.EndpointLike`."""
        self._network._forget(self)
