"""The wire between GPUs: tensors over the group's communicators, everything else over a companion wire.

A frame whose parts are all in host memory passes through the companion (shm or tcp) as it is. One with tensors among
its parts is *announced* there first, as a frame of the same tag whose kind has ``ANNOUNCED`` added and whose first part
says how it comes (below) and for each part how many bytes it has on the device, or -1 for a host part; the host
parts follow. Then the tensors
go as raw bytes over the communicator of the sender's direction: the receiver knows what to expect before it posts a
receive, and no receive is ever posted without an announcement. (Bytes, because NCCL moves them alike whatever they
mean, and a model's dtype need not be one that NCCL knows, such as fp8.)

``ask`` says also how large the answer can be at most: the peer's one frame of the same tag, whose receive is posted at
once where :mod:`.nccl_rooms` has room for it. The peer answers by an ordinary ``send``; its payload goes into the room,
and all rooms of a batch are handed out when the last of them is filled.

The contract of :mod:`.base` holds, with these additions:

* Received tensors are uint8 [bytes] on the group's device; work that the receiving thread enqueues before its next
  ``recv``, or before it lets go of the frame if it keeps that, may use them. Tensors to send may be any contiguous
  ones; they are copied when ``send`` returns, in the order of the thread's current stream.
* ``recv`` hands out a frame once its payload has *arrived*, not merely been posted: what an abort leaves behind is
  never taken for data. Stale frames are dropped after their payload has arrived, or the sender would hang.
* Frames taken in are posted ahead of ``recv``, up to ``MAX_BACKLOG_BYTES``.
* Not pairwise: a peer that dies takes the group with it (see :mod:`.nccl_group`). ``close`` says farewell, and a peer
  that was told so goes on with the others.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor

from actors.transport.base import (
    MAX_BACKLOG_BYTES,
    MAX_FRAME_BYTES,
    MAX_PARTS,
    Buffer,
    FrameTag,
    Medium,
    Part,
    PeerGone,
    ProtocolError,
    TransportError,
    Wire,
    WireTimeout,
)
from actors.transport.blocks import Block, footprint
from actors.transport.communicator import Pending
from actors.transport.frame import HEADER_BYTES, byte_view
from actors.transport.inbox import InboxWire
from actors.transport.nccl_group import NcclGroup
from actors.transport.nccl_rooms import ROOM_BYTES, Room
from actors.transport.stream import poll_on

ANNOUNCED = 0x8000
"""Added to the kind of an announcement; the kinds of frames on this wire are below it."""

_FAREWELL = 0xFFFF
_FAREWELL_S = 0.1
_ON_HOST = -1

_EXACT = 0
"""How a payload comes: as announced. Greater: so too, and its answer has a room of so many bytes."""
_IN_ROOM = -1
"""How a payload comes: in the room of the frame with the same tag that asked for it."""


class _Landing(NamedTuple):
    """A frame taken in, whose payload may still be on its way (``pending``)."""

    kind: int
    tag: FrameTag
    parts: tuple[Part, ...]
    block: Block
    size: int
    pending: Pending | None


class NcclWire(InboxWire):
    """Our end of a pair inside ``group``. Takes over ``companion``, whose peer must be a member of the group."""

    def __init__(self, companion: Wire, group: NcclGroup, spin_us: float = 50.0) -> None:
        """Errors: ValueError when the companion's peer is not in the group's plan."""
        self._rank = group.plan.rank(companion.peer)
        super().__init__(companion.peer, Medium.NCCL, spin_us)
        self._companion = companion
        self._group = group
        self._landing: deque[_Landing] = deque()
        self._landing_bytes = 0
        self._on_device: dict[Block, list[Tensor]] = {}
        self._asked: dict[FrameTag, Room] = {}  # our questions whose answers come in a room
        self._owed: dict[FrameTag, int] = {}  # the peer's questions, and the sizes of their rooms
        self._farewell = False
        self._ringing = threading.Lock()
        self._bell: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll_recv = poll_on(self.filenos())
        group.join(self)

    def send(self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], deadline: float) -> None:
        """See :meth:`Wire.send`; sends inside ``group.batch()`` leave when the block ends, under the last deadline.

        Errors: also ValueError for an answer that is larger than was asked for.
        """
        self._send(kind, tag, parts, deadline, 0)

    def ask(
        self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], answer_bytes: int, deadline: float
    ) -> None:
        """See :meth:`Wire.ask`. A question that nobody answers before ``deadline`` ends the group, as a death does."""
        self._send(kind, tag, parts, deadline, answer_bytes)

    def _send(
        self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], deadline: float, answer_bytes: int
    ) -> None:
        if not 0 <= kind < ANNOUNCED:
            raise ValueError(f"kind is {kind}; allowed on an nccl wire are 0 to {ANNOUNCED - 1}")
        sizes = _device_sizes(parts)
        host = [part for part in parts if not isinstance(part, Tensor)]
        try:
            with self._use:
                self._require_open()
                if tag in self._owed:
                    self._answer(kind, tag, parts, sizes, deadline)
                elif len(host) == len(parts) and not answer_bytes:
                    self._tell(kind, tag, host, deadline)
                else:
                    self._send_tensors(kind, tag, parts, sizes, deadline, answer_bytes)
                self._count(sum(size for size in sizes if size > 0), host)
        except WireTimeout:
            self.close()
            raise

    def filenos(self) -> tuple[int, ...]:
        """See :meth:`Wire.filenos`."""
        return () if self._bell is None else (*self._companion.filenos(), self._bell)

    def close(self) -> None:
        """See :meth:`Wire.close`. The peer is told when this is no accident, unless a call is running on this wire."""
        quiet = self._end is None and self._group.failure is None
        if quiet and self._use.acquire(blocking=False):
            try:
                # A courtesy: a peer that cannot hear it takes the end of the companion for our death.
                with suppress(TransportError):
                    self._companion.send(_FAREWELL, FrameTag(), [], time.monotonic() + _FAREWELL_S)
            finally:
                self._use.release()
        super().close()

    # -- for the group ---------------------------------------------------------------------------------------------

    def pump(self) -> bool:
        """See :class:`~.nccl_group.Member`."""
        with self._use:
            return self._end is None and self._take_in()

    def news(self) -> tuple[int, ...]:
        """See :class:`~.nccl_group.Member`."""
        if self._end is not None or not self._hungry():
            return ()
        # After a farewell the companion has nothing to tell and is readable for ever: only payload is awaited.
        return self.filenos()[-1:] if self._farewell else self.filenos()

    def ends(self) -> tuple[int, ...]:
        """See :class:`~.nccl_group.Member`."""
        return () if self._end is not None or self._farewell else self._companion.filenos()

    def ring(self) -> None:
        """See :class:`~.nccl_group.Member`."""
        with self._ringing:
            if self._bell is not None:
                os.eventfd_write(self._bell, 1)

    # -- for InboxWire ---------------------------------------------------------------------------------------------

    def _take_in(self) -> bool:
        self._hush()
        moved = False
        while self._end is None and not self._farewell and self._hungry() and self._companion.ready():
            self._read_companion()
            moved = True
        while self._landing and self._landed(self._landing[0]):
            kind, tag, parts, block, size, _ = self._landing.popleft()
            self._landing_bytes -= size
            self._arrived(kind, tag, parts, block, size)
            moved = True
        self._look_for_end()
        return moved

    def _look_for_end(self) -> None:
        if self._group.failure is not None:
            self._set_end(PeerGone, f"{self.peer!r}: the group of this wire is over: {self._group.failure}")
        elif self._farewell and self._asked:
            self._lost(PeerGone, f"{self.peer!r} closed its nccl wire and owes answers")
        elif self._farewell and not self._landing:
            self._set_end(PeerGone, f"{self.peer!r} closed its nccl wire")

    def _await(self, deadline: float) -> bool:
        return bool(self._waiter.wait(self._poll_recv, deadline))

    def _interrupt(self) -> None:
        self.ring()

    def _free(self) -> None:
        self._group.leave(self)
        self._companion.close()
        # Payload that is still on its way stays alive with its pending exchange.
        self._landing.clear()
        self._on_device.clear()
        with self._ringing:
            bell, self._bell = self._bell, None
        if bell is not None:
            os.close(bell)

    def _give_back(self, block: Block) -> None:
        for tensor in self._on_device.pop(block, ()):
            self._group.pool.give(tensor)
        super()._give_back(block)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _send_tensors(
        self,
        kind: int,
        tag: FrameTag,
        parts: Sequence[Buffer | Tensor],
        sizes: Sequence[int],
        deadline: float,
        answer_bytes: int,
    ) -> None:
        with self._group.batch():
            self._group.begin_send(deadline, self._require_open)
            room = self._group.reserve(answer_bytes, self._rank) if answer_bytes else None
            how = _EXACT if room is None else room.tensor.numel()
            try:
                self._announce(kind, tag, how, parts, sizes, deadline)
            except BaseException:
                if room is not None:
                    self._group.cancel(room)
                raise
            if room is not None:
                self._asked[tag] = room
            for part in parts:
                if isinstance(part, Tensor) and part.numel():
                    self._group.send(part, self._rank)

    def _answer(
        self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], sizes: Sequence[int], deadline: float
    ) -> None:
        size, needed = self._owed[tag], footprint([size for size in sizes if size > 0])
        if needed > size:
            raise ValueError(f"an answer of {needed} bytes to {self.peer!r}, which asked for at most {size}")
        self._announce(kind, tag, _IN_ROOM, parts, sizes, deadline)
        del self._owed[tag]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        self._group.fill(size, tensors, self._rank, deadline)

    def _announce(
        self,
        kind: int,
        tag: FrameTag,
        how: int,
        parts: Sequence[Buffer | Tensor],
        sizes: Sequence[int],
        deadline: float,
    ) -> None:
        plan = struct.pack(f"<{1 + len(sizes)}q", how, *sizes)
        host = [part for part in parts if not isinstance(part, Tensor)]
        self._tell(kind | ANNOUNCED, tag, [plan, *host], deadline)

    def _tell(self, kind: int, tag: FrameTag, parts: Sequence[Buffer], deadline: float) -> None:
        try:
            self._companion.send(kind, tag, parts, deadline)
        except (PeerGone, WireTimeout) as error:
            self._take_in()  # a farewell may be here already: then this is an orderly end, and the group goes on
            if not self._farewell:
                # The companion is torn: nothing can be announced any more, and payload under way may never be received.
                self._lost(PeerGone, str(error))
            raise

    def _lost(self, error: type[TransportError], text: str) -> None:
        self._group.abort(f"the wire to {self.peer!r} is lost: {text}")
        self._set_end(error, text)

    def _hungry(self) -> bool:
        """Room in the backlog; or the peer has hung up, and what it left, at most a ring or a socket's buffer of
        announcements, must be read to learn whether it died."""
        return self._backlog + self._landing_bytes < MAX_BACKLOG_BYTES or bool(poll_on((), ends=self.ends())(0.0))

    def _landed(self, item: _Landing) -> bool:
        return item.pending is None or self._group.completed(item.pending)

    def _read_companion(self) -> None:
        try:
            frame = self._companion.recv(time.monotonic())
            if frame.kind == _FAREWELL:
                self._farewell = True
                return
            host = [byte_view(part) for part in frame.parts]
            if frame.kind & ANNOUNCED:
                how, sizes = self._announced(host)
                self._land(frame.kind & ~ANNOUNCED, frame.tag, how, sizes, host[1:])
            else:
                self._land(frame.kind, frame.tag, _EXACT, [_ON_HOST] * len(host), host)
        except TransportError as error:
            self._lost(type(error), str(error))

    def _announced(self, parts: Sequence[memoryview]) -> tuple[int, list[int]]:
        """How the payload comes, and the bytes of each part on the device, or -1. Errors: ProtocolError."""
        plan = parts[0] if parts else memoryview(b"")
        words = list(struct.unpack(f"<{len(plan) // 8}q", plan)) if len(plan) % 8 == 0 else []
        how, sizes = (words[0], words[1:]) if words else (_EXACT, [])
        fits = len(words) > 0 and len(sizes) <= MAX_PARTS and sizes.count(_ON_HOST) == len(parts) - 1
        device = sum(size for size in sizes if size > 0)
        if (
            not fits
            or min(sizes, default=0) < _ON_HOST
            or device > MAX_FRAME_BYTES
            or not _IN_ROOM <= how <= ROOM_BYTES
        ):
            raise ProtocolError(
                f"{self.peer!r} announced parts of {sizes} bytes (-1: here) with {len(parts) - 1}, {how}"
            )
        return how, sizes

    def _land(self, kind: int, tag: FrameTag, how: int, sizes: Sequence[int], host: Sequence[memoryview]) -> None:
        lengths = [len(part) for part in host]
        block = self._pool.take(footprint(lengths))
        kept = block.split(lengths)
        for target, part in zip(kept, host, strict=True):
            target[:] = part
        device = [size for size in sizes if size != _ON_HOST]
        tensors, pending = self._from_room(tag, block, device) if how == _IN_ROOM else self._posted(block, device)
        if how > 0:
            self._owed[tag] = how
        from_host, from_device = iter(kept), iter(tensors)
        parts: list[Part] = [next(from_host) if size == _ON_HOST else next(from_device) for size in sizes]
        size = HEADER_BYTES + sum(lengths) + sum(device)
        self._landing.append(_Landing(kind, tag, tuple(parts), block, size, pending))
        self._landing_bytes += size

    def _posted(self, block: Block, sizes: Sequence[int]) -> tuple[list[Tensor], Pending | None]:
        """Memory for an exact payload, whose receives are posted now."""
        tensors = self._on_device[block] = [self._group.pool.take(size) for size in sizes]
        payload = [tensor for tensor in tensors if tensor.numel()]
        return tensors, self._group.receive(payload, self._rank, self.ring) if payload else None

    def _from_room(self, tag: FrameTag, block: Block, sizes: Sequence[int]) -> tuple[list[Tensor], Pending | None]:
        """Where a payload comes that we have asked for."""
        room = self._asked.pop(tag, None)
        if room is None or footprint(sizes) > room.tensor.numel():
            raise ProtocolError(
                f"{self.peer!r} announced an answer of {sum(sizes)} bytes that was not asked for: {tag}"
            )
        self._on_device[block] = [room.tensor]
        self._group.expect()
        return room.split(sizes), room.pending

    def _count(self, on_device: int, host: Sequence[Buffer]) -> None:
        self._counted.frames_sent += 1
        self._counted.bytes_sent += HEADER_BYTES + on_device + sum(len(byte_view(part)) for part in host)

    def _hush(self) -> None:
        assert self._bell is not None
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return


def _device_sizes(parts: Sequence[Buffer | Tensor]) -> list[int]:
    """Bytes of each part on the device, or -1 for a host part. Errors: ValueError (a limit, not contiguous)."""
    if len(parts) > MAX_PARTS:
        raise ValueError(f"a frame has {len(parts)} parts; at most {MAX_PARTS} are allowed")
    sizes = [part.nbytes if isinstance(part, Tensor) else _ON_HOST for part in parts]
    total = sum(size for size in sizes if size > 0)
    total += sum(len(byte_view(part)) for part in parts if not isinstance(part, Tensor))
    if total > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {total} bytes; at most {MAX_FRAME_BYTES} are allowed")
    for part in parts:
        if isinstance(part, Tensor) and not part.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(part.shape)} and strides {part.stride()} is not contiguous")
    return sizes
