"""Waiting on many wires at once: a router on its shards, a shard on its routers."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Sequence
from typing import Protocol

from actors.transport.base import Wire
from actors.transport.waiting import Waiter

SPIN_US = 50.0
"""How long a wait polls at most before it blocks."""


class Express(Protocol):
    """Serves the common frames of some wires while it waits for all of them; see :mod:`actors.express`."""

    def watch(self, wire: Wire, fds: Sequence[int]) -> None:
        """The poller watches ``wire`` by these descriptors, of which it has none that another wire has."""

    def forget(self, fds: Sequence[int]) -> None:
        """It does so no longer."""

    def usable(self) -> bool:
        """Whether it may serve frames now."""

    def wait(self, epoll: int, deadline: float) -> Sequence[tuple[int, int]]:
        """Events (descriptor, what) that are not its own, for at least each wire that has frames in hand; none when the
        ``deadline`` (monotonic) has passed."""


class Poller:
    """Which of several wires have something for ``recv``. Works with wires of every medium, mixed.

    One thread adds, removes and waits; ``wake`` may come from any thread (or a signal handler) at any time.
    Closing a wire that is still added wakes the waiter, which gets it as ready; remove it then.
    """

    def __init__(self, spin_us: float = SPIN_US, express: Express | None = None) -> None:
        self._epoll = select.epoll()
        self._waiter = Waiter(spin_us)
        self._express = express
        self._owned: dict[Wire, tuple[int, ...]] = {}
        self._wire_of: dict[int, Wire] = {}
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._alive = threading.RLock()
        self._closed = False

    def add(self, wire: Wire) -> None:
        """Watch ``wire`` too. Errors: ValueError when it is already watched."""
        if wire in self._owned:
            raise ValueError(f"the wire to {wire.peer!r} is already in this poller")
        # Duplicates, because the wire may be closed first: the peer's copy of a doorbell would keep a
        # registration under the wire's own number alive, which then could not be taken out any more.
        fds = tuple(os.dup(fd) for fd in wire.filenos())
        self._owned[wire] = fds
        for fd in fds:
            self._wire_of[fd] = wire
            self._epoll.register(fd, select.EPOLLIN)
        if self._express is not None:
            self._express.watch(wire, fds)

    def remove(self, wire: Wire) -> None:
        """Watch it no longer. Errors: ValueError when it was not watched."""
        if wire not in self._owned:
            raise ValueError(f"the wire to {wire.peer!r} is not in this poller")
        if self._express is not None:
            self._express.forget(self._owned[wire])
        for fd in self._owned.pop(wire):
            del self._wire_of[fd]
            self._epoll.unregister(fd)
            os.close(fd)

    def wait(self, deadline: float) -> list[Wire]:
        """The wires whose ``ready()`` holds, each once; waits for the first of them until ``deadline``
        (monotonic).

        Empty when ``wake`` was called (since the last ``wait`` returned, or during this one) and when the
        deadline passed: a caller who must know which looks at the clock or at what its waker left behind. A
        deadline in the past makes this a look without waiting.
        """
        ready = [wire for wire in self._owned if wire.buffered()]
        while True:
            # Those that have frames in hand do not keep the others from being seen.
            events = self._poll(0.0) if ready else self._wait(deadline)
            woken = False
            for fd, _ in events:
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    woken = True
                    continue
                wire = self._wire_of[fd]
                if wire not in ready and wire.ready():
                    ready.append(wire)
            # A doorbell may have brought part of a frame only: then there is nothing to tell yet.
            if ready or woken or not events:
                return ready

    def _wait(self, deadline: float) -> Sequence[tuple[int, int]]:
        if self._express is not None and self._express.usable():
            return self._express.wait(self._epoll.fileno(), deadline)
        return self._waiter.wait(self._poll, deadline)

    def _poll(self, seconds: float) -> list[tuple[int, int]]:
        # The default makes room for 1023 events in each call.
        return self._epoll.poll(seconds, 64)

    def wake(self) -> None:
        """Make the current ``wait``, or else the next, return now. Does nothing once the poller is closed."""
        with self._alive:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Free the poller's descriptors; the wires stay open. Idempotent; not while another thread waits."""
        with self._alive:
            if self._closed:
                return
            self._closed = True
            for wire in list(self._owned):
                self.remove(wire)
            self._epoll.close()
            os.close(self._wake_fd)
