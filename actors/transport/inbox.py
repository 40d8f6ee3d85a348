"""What every wire does with a frame once it is here: keep it, hand it out, drop it when stale, and end
cleanly.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from actors.transport.base import (
    Frame,
    FrameTag,
    Medium,
    Part,
    PeerGone,
    TransportError,
    Wire,
    WireStats,
    WireTimeout,
)
from actors.transport.blocks import Block, BlockPool
from actors.transport.waiting import Waiter


class _Arrived(NamedTuple):
    frame: Frame
    block: Block
    size: int


class InboxWire(Wire):
    """Receiving half of a wire; a medium adds how bytes come in (``_take_in``) and waiting (``_await``)."""

    def __init__(self, peer: str, medium: Medium, spin_us: float) -> None:
        self.peer = peer
        self.medium = medium
        self._counted = WireStats()
        self._waiter = Waiter(spin_us)
        self._pool = BlockPool()
        self._inbox: deque[_Arrived] = deque()
        self._backlog = 0
        self._current: Block | None = None
        self._fence_key = (0, 0, 0)
        self._end: tuple[type[TransportError], str] | None = None
        self._freed = False
        # A call holds _use while it runs, so that close() from another thread frees nothing under its feet.
        # It is reentrant because a signal handler may close the wire on top of a call of the same thread.
        self._use = threading.RLock()
        self._closing = threading.RLock()

    @property
    def stats(self) -> WireStats:
        """See :attr:`Wire.stats`."""
        return self._counted

    def recv(self, deadline: float) -> Frame:
        """See :meth:`Wire.recv`."""
        with self._use:
            self._release_current()
            while not self._inbox and not self._freed:
                if self._take_in():
                    continue
                if self._end is not None:
                    break
                if not self._await(deadline):
                    raise WireTimeout(f"no frame from {self.peer!r} over {self.medium} before the deadline")
            if self._inbox:
                return self._hand_out()
            error = self._end_error()
        if isinstance(error, PeerGone):
            raise error
        self.close()
        raise error

    def keep(self) -> Callable[[], None]:
        """See :meth:`Wire.keep`."""
        block, self._current = self._current, None
        return _nothing if block is None else partial(self._give_back, block)

    def ready(self) -> bool:
        """See :meth:`Wire.ready`."""
        with self._use:
            while not self.buffered():
                if not self._take_in():
                    self._look_for_end()
                    return self._end is not None
            return True

    def buffered(self) -> bool:
        """See :meth:`Wire.buffered`."""
        return bool(self._inbox) or self._end is not None

    def fence(self, tag: FrameTag) -> None:
        """See :meth:`Wire.fence`."""
        with self._use:
            self._fence_key = max(self._fence_key, tag.fence_key)
            kept = [item for item in self._inbox if item.frame.tag.fence_key >= self._fence_key]
            for item in self._inbox:
                if item.frame.tag.fence_key < self._fence_key:
                    self._counted.dropped += 1
                    self._backlog -= item.size
                    self._give_back(item.block)
            self._inbox = deque(kept)

    def close(self) -> None:
        """See :meth:`Wire.close`."""
        with self._closing:
            if self._freed:
                return
            self._end = (PeerGone, f"the wire to {self.peer!r} was closed at this end")
            self._interrupt()
            with self._use:
                self._freed = True
                self._inbox.clear()
                self._free()

    @abstractmethod
    def _take_in(self) -> bool:
        """Move what is here into the inbox until one frame is whole or nothing is left; True if anything
        moved.
        """

    @abstractmethod
    def _await(self, deadline: float) -> bool:
        """Wait until ``_take_in`` may do something or the wire ended. False when the deadline passed."""

    @abstractmethod
    def _look_for_end(self) -> None:
        """Set ``_end`` if the peer is known to be gone. Never blocks."""

    @abstractmethod
    def _interrupt(self) -> None:
        """Wake a call of another thread that waits on this wire, and let the peer see the end."""

    @abstractmethod
    def _free(self) -> None:
        """Give back descriptors and memory; called once, with no call running."""

    def _arrived(self, kind: int, tag: FrameTag, parts: tuple[Part, ...], block: Block, size: int) -> None:
        self._counted.frames_received += 1
        self._counted.bytes_received += size
        if tag.fence_key < self._fence_key:
            self._counted.dropped += 1
            self._give_back(block)
            return
        self._inbox.append(_Arrived(Frame(kind, tag, parts), block, size))
        self._backlog += size

    def _hand_out(self) -> Frame:
        frame, self._current, size = self._inbox.popleft()
        self._backlog -= size
        return frame

    def _release_current(self) -> None:
        if self._current is not None:
            self._give_back(self._current)
            self._current = None

    def _give_back(self, block: Block) -> None:
        self._pool.give(block)

    def _set_end(self, error: type[TransportError], text: str) -> None:
        # The first reason stays: what follows from it (a reset after a garbled frame) would only hide it.
        if self._end is None:
            self._end = (error, text)

    def _end_error(self) -> TransportError:
        assert self._end is not None
        error, text = self._end
        return error(text)

    def _require_open(self) -> None:
        if self._end is not None:
            raise PeerGone(self._end[1])


def _nothing() -> None:
    """There was no frame to keep."""
