"""Frames over a stream of bytes: what the shared-memory and the TCP wire have in common."""

from __future__ import annotations

import select
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actors.transport.base import (
    MAX_BACKLOG_BYTES,
    Buffer,
    FrameTag,
    Medium,
    PeerGone,
    ProtocolError,
    WireTimeout,
)
from actors.transport.blocks import Block, footprint
from actors.transport.frame import HEADER_BYTES, Header, byte_view, decode_header, encode_header, filling
from actors.transport.inbox import InboxWire

if TYPE_CHECKING:
    from torch import Tensor

Poll = Callable[[float], Sequence[tuple[int, int]]]
"""Waits up to so many seconds; (descriptor, events) of what became ready."""


def poll_on(reads: Sequence[int], writes: Sequence[int] = (), ends: Sequence[int] = ()) -> Poll:
    """A reusable poll for input on ``reads``, output on ``writes`` and the peer's hanging up on ``ends`` (a descriptor
    may be in several)."""
    poller = select.poll()
    for fd in {*reads, *writes, *ends}:
        wanted = ((reads, select.POLLIN), (writes, select.POLLOUT), (ends, select.POLLRDHUP))
        poller.register(fd, sum(event for fds, event in wanted if fd in fds))
    return lambda seconds: poller.poll(seconds * 1000.0)


class StreamWire(InboxWire):
    """Sends and reassembles frames; a medium supplies ``_push``, ``_pull`` and three polls.

    ``_poll_recv`` wakes on input or the peer's end, ``_poll_send`` on room for output as well, ``_poll_room``
    on room or the peer's end only (used when the backlog is full and input must wait).
    """

    _poll_recv: Poll
    _poll_send: Poll
    _poll_room: Poll

    def __init__(self, peer: str, medium: Medium, spin_us: float) -> None:
        super().__init__(peer, medium, spin_us)
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._target = self._head
        self._header: Header | None = None
        self._block: Block | None = None
        self._parts: tuple[memoryview, ...] = ()

    def send(self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], deadline: float) -> None:
        """See :meth:`Wire.send`."""
        views = [byte_view(part) for part in parts]
        lengths = [len(view) for view in views]
        outgoing = deque([memoryview(encode_header(kind, tag, lengths))])
        for view in views:
            outgoing.extend(filter(None, (view, memoryview(filling(len(view))))))
        size = HEADER_BYTES + sum(lengths)
        try:
            with self._use:
                self._send_all(outgoing, deadline)
                self._counted.frames_sent += 1
                self._counted.bytes_sent += size
        except PeerGone:
            raise
        except BaseException:
            # Half a frame may be out: whatever stopped us (the deadline, an interrupt), the stream is torn.
            self.close()
            raise

    def _send_all(self, outgoing: deque[memoryview], deadline: float) -> None:
        while outgoing:
            self._require_open()
            if self._push(outgoing):
                continue
            # The peer may be in a send itself, waiting for us to take in: do so before waiting for room.
            hungry = self._backlog < MAX_BACKLOG_BYTES
            if hungry and self._take_in():
                continue
            if not self._waited(self._poll_send if hungry else self._poll_room, deadline):
                raise WireTimeout(f"{self.peer!r} made no room for a frame over {self.medium} before the deadline")

    @abstractmethod
    def _push(self, outgoing: deque[memoryview]) -> bool:
        """Write what there is room for and take it off the front of ``outgoing``; True if anything went."""

    @abstractmethod
    def _pull(self, target: memoryview) -> int:
        """Fill the front of ``target`` with what is here; the number of bytes, 0 when nothing is."""

    @abstractmethod
    def _in_hand(self) -> bool:
        """True when ``_pull`` has bytes of which the descriptors tell nothing any more."""

    def _take_in(self) -> bool:
        moved = whole = False
        # A garbled stream leaves an empty target: nothing after the fault can be trusted.
        while self._target and not self._freed:
            # What is in hand rings no bell again, so it must not stay behind a whole frame: a Poller would
            # wait for it in vain.
            if whole and not self._in_hand():
                break
            count = self._pull(self._target)
            if count == 0:
                break
            moved = True
            if count < len(self._target):
                self._target = self._target[count:]
            else:
                whole = self._filled() or whole
        return moved

    def _filled(self) -> bool:
        """The target, a header or what follows it, is full: aim at the next. True when the frame is whole."""
        if self._header is None and not (self._begin() and not self._target):
            return False
        assert self._header is not None
        assert self._block is not None
        kind, tag, lengths = self._header
        self._arrived(kind, tag, self._parts, self._block, HEADER_BYTES + sum(lengths))
        self._header = self._block = None
        self._parts = ()
        self._target = self._head
        return True

    def _begin(self) -> bool:
        try:
            header = decode_header(self._head)
        except ProtocolError as error:
            self._target = self._head[:0]
            self._set_end(ProtocolError, f"from {self.peer!r} over {self.medium}: {error}")
            return False
        size = footprint(header.lengths)
        self._block = self._pool.take(size)
        self._parts = self._block.split(header.lengths)
        self._target = self._block.view[:size]
        self._header = header
        return True

    def _await(self, deadline: float) -> bool:
        return self._waited(self._poll_recv, deadline)

    def _waited(self, poll: Poll, deadline: float) -> bool:
        events = self._waiter.wait(poll, deadline)
        if not events:
            return False
        self._notice(events)
        return True

    def _notice(self, events: Sequence[tuple[int, int]]) -> None:
        """Look at what woke us. Media whose ``_pull`` cannot tell the peer's end do it here."""
