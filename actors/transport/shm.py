"""The wire between processes of one node: two rings in a memfd, eventfds as doorbells, a Unix socket for EOF.

The doorbells' 64-bit counters *are* the shared indices. Whoever wrote n bytes into a ring adds n to its data
bell; whoever took n bytes out adds n to its space bell; the other side learns of them by reading the bell. No
index lies in shared memory, so nothing depends on the CPU's memory order: the bell's write and read are
system calls that take the same lock, and so order the copies before and after them on every architecture.

Nothing has a name: the memory is a sealed memfd, handed over the socket together with the bells (SCM_RIGHTS),
and goes with the last process that maps it, whoever dies and however.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actors.transport.base import Buffer, FrameTag, HandshakeRefused, Medium, PeerGone, ProtocolError, Wire, WireStats
from actors.transport.ring import PlainRing, Ring, make_ring
from actors.transport.sockets import recv_exact, send_exact, shutdown, wait_for
from actors.transport.stream import StreamWire, poll_on

if TYPE_CHECKING:
    from torch import Tensor

MIN_RING_BYTES = 64 << 10
MAX_RING_BYTES = 1 << 30

_PIECE_BYTES = 256 << 10
"""A large frame rings once per so many bytes, so that the reader copies one piece while the next is written.
"""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_SETUP = struct.Struct("<Q")
_READY = b"R"
_BELLS = 4


class ShmWire(StreamWire):
    """See the module's text. Made by :func:`offer` and :func:`adopt`."""

    def __init__(
        self,
        peer: str,
        sock: socket.socket,
        shared: mmap.mmap,
        bells: Sequence[int],
        first: bool,
        spin_us: float,
    ) -> None:
        """Takes over ``sock``, ``shared`` (two rings of equal size) and ``bells`` (data and space of ring 0,
        then of ring 1). The ``first`` end writes ring 0 and reads ring 1, the other the reverse.
        """
        super().__init__(peer, Medium.SHM, spin_us)
        size = len(shared) // 2
        self._sock = sock
        self._shared = shared
        self._bells = tuple(bells)
        with memoryview(shared) as whole:
            rings = (whole[:size], whole[size:])
        out, into = (0, 1) if first else (1, 0)
        self._size = size
        self._out = make_ring(rings[out], bells[2 * out], bells[2 * out + 1], size)
        self._in = make_ring(rings[into], bells[2 * into], bells[2 * into + 1], 0)
        self._sock_fd = sock.fileno()
        self._poll_recv = poll_on((self._in.data_bell, self._sock_fd))
        self._poll_send = poll_on((self._in.data_bell, self._out.space_bell, self._sock_fd))
        self._poll_room = poll_on((self._out.space_bell, self._sock_fd))

    @property
    def rings(self) -> tuple[Ring, Ring]:
        """What it reads and what it writes, for who moves whole frames past this wire: see :mod:`actors.express`."""
        return self._in, self._out

    @property
    def stats(self) -> WireStats:
        """See :attr:`Wire.stats`; with what was moved past this wire."""
        own, out, into = self._counted, self._out, self._in
        return WireStats(
            own.bytes_sent + out.bytes,
            own.bytes_received + into.bytes,
            own.frames_sent + out.frames,
            own.frames_received + into.frames,
            own.dropped,
        )

    def filenos(self) -> tuple[int, ...]:
        """See :meth:`Wire.filenos`."""
        return () if self._freed else (self._in.data_bell, self._sock_fd)

    def send(self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], deadline: float) -> None:
        """See :meth:`Wire.send`."""
        with self._use:
            size = 0 if self._end else self._out.put(kind, tag, parts)
            if size:
                self._counted.frames_sent += 1
                self._counted.bytes_sent += size
                return
        super().send(kind, tag, parts, deadline)

    def _take_in(self) -> bool:
        """As a stream does, but frames that are here whole are taken in one call each."""
        moved = False
        while self._target is self._head and not self._freed and (self._in.known or not moved):
            taken = self._in.take(self._pool.take)
            if taken is None:
                break
            kind, tag, parts, block, size = taken
            self._announce()
            self._arrived(kind, FrameTag._make(tag), parts, block, size)
            moved = True
        if moved and not self._in.known:
            return True
        # What is left is part of a frame, or garbled, which no bell would tell.
        moved = super()._take_in() or moved
        self._in.partial = self._target is not self._head
        return moved

    def _push(self, outgoing: deque[memoryview]) -> bool:
        ring = self._out
        written = 0
        while outgoing and written < _PIECE_BYTES:
            if self._lied_to(ring):
                break
            room = min(ring.known, _PIECE_BYTES - written)
            if room == 0:
                if self._answer_bell(ring.space_bell, ring):
                    continue
                break
            view = outgoing.popleft()
            if len(view) > room:
                outgoing.appendleft(view[room:])
                view = view[:room]
            self._write(ring, view)
            written += len(view)
        if written:
            os.eventfd_write(ring.data_bell, written)
        return written > 0

    def _write(self, ring: Ring, view: memoryview) -> None:
        count = len(view)
        start, end = ring.position, ring.position + count
        if end <= self._size:
            ring.memory[start:end] = view
        else:
            fits = self._size - start
            ring.memory[start:] = view[:fits]
            ring.memory[: end - self._size] = view[fits:]
        ring.position = end % self._size
        ring.known -= count

    def _pull(self, target: memoryview) -> int:
        ring = self._in
        if not ring.known:
            self._answer_bell(ring.data_bell, ring)
        if not ring.known or self._lied_to(ring):
            return 0
        count = min(ring.known, len(target))
        start, end = ring.position, ring.position + count
        if end <= self._size:
            target[:count] = ring.memory[start:end]
        else:
            fits = self._size - start
            target[:fits] = ring.memory[start:]
            target[fits:count] = ring.memory[: end - self._size]
        ring.position = end % self._size
        ring.known -= count
        ring.unannounced += count
        self._announce()
        return count

    def _announce(self) -> None:
        """Tell the peer of the room there is, if it is worth a system call."""
        ring = self._in
        # A writer waits only when the ring is full, and then at least three quarters are announced or still
        # to be read: holding back a quarter saves small frames a system call and can lock nobody.
        if ring.unannounced >= self._size // 4:
            os.eventfd_write(ring.space_bell, ring.unannounced)
            ring.unannounced = 0

    def _in_hand(self) -> bool:
        return self._in.known > 0

    def _answer_bell(self, bell: int, ring: Ring) -> bool:
        """Learn how many bytes the peer has handled since the last look; False when none."""
        try:
            ring.known += os.eventfd_read(bell)
        except BlockingIOError:
            return False
        return not self._lied_to(ring)

    def _lied_to(self, ring: Ring) -> bool:
        """Whether the peer claims to have handled more than there is: nothing it sends can be trusted then."""
        if ring.known > self._size:
            self._target = self._head[:0]
            self._set_end(ProtocolError, f"{self.peer!r} announced {ring.known} bytes of a ring of {self._size}")
            return True
        return False

    def _notice(self, events: Sequence[tuple[int, int]]) -> None:
        for fd, _ in events:
            if fd == self._sock_fd:
                self._look_for_end()

    def _look_for_end(self) -> None:
        if self._freed:
            return
        try:
            data = self._sock.recv(1)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if data:
            self._set_end(ProtocolError, f"{self.peer!r} sent bytes over the socket that only tells its end")
        else:
            self._set_end(PeerGone, f"{self.peer!r} closed its shared-memory wire or died")

    def _interrupt(self) -> None:
        # Both ends' polls watch the socket, so this wakes a waiting thread here and tells the peer at once.
        shutdown(self._sock)

    def _free(self) -> None:
        self._out.close()
        self._in.close()
        self._shared.close()
        self._sock.close()
        for bell in self._bells:
            os.close(bell)


def compiled_rings(wire: Wire) -> tuple[Ring, Ring] | None:
    """What ``wire`` reads and what it writes, if these are compiled rings."""
    rings = wire.rings if isinstance(wire, ShmWire) else None
    return None if rings is None or isinstance(rings[0], PlainRing) else rings


def offer(sock: socket.socket, peer: str, ring_bytes: int, spin_us: float, deadline: float) -> ShmWire:
    """The connecting end: make rings and bells, hand them over ``sock``, wait until the peer has mapped them.

    Takes over ``sock``. Errors: WireTimeout, PeerGone; everything made is freed then.
    """
    memory = os.memfd_create("expertmesh-rings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fds = [memory]
    try:
        os.ftruncate(memory, 2 * ring_bytes)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        for _ in range(_BELLS):
            fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        socket.send_fds(sock, [_SETUP.pack(ring_bytes)], fds)
        recv_exact(sock, len(_READY), deadline, f"setting up shared memory with {peer!r}")
        shared = mmap.mmap(memory, 2 * ring_bytes)
    except BaseException:
        _close_all(fds)
        raise
    os.close(memory)
    return ShmWire(peer, sock, shared, fds[1:], True, spin_us)


def adopt(sock: socket.socket, peer: str, spin_us: float, deadline: float) -> ShmWire:
    """The accepting end: take rings and bells from ``sock`` and map them. Takes over ``sock``.

    Errors: WireTimeout, PeerGone, HandshakeRefused (what came is not two sealed rings and four bells).
    """
    wait_for(sock, select.POLLIN, deadline, f"shared memory from {peer!r}")
    data, fds, _, _ = socket.recv_fds(sock, _SETUP.size, 1 + _BELLS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            raise PeerGone(f"shared memory from {peer!r}: the other side closed the connection")
        if len(data) != _SETUP.size or len(fds) != 1 + _BELLS:
            raise HandshakeRefused(f"{peer!r} sent {len(data)} bytes and {len(fds)} descriptors; 8 and 5 are due")
        (ring_bytes,) = _SETUP.unpack(data)
        _require_rings(fds[0], ring_bytes, peer)
        shared = mmap.mmap(fds[0], 2 * ring_bytes)
        send_exact(sock, _READY, deadline, f"setting up shared memory with {peer!r}")
    except BaseException:
        _close_all(fds)
        raise
    os.close(fds[0])
    return ShmWire(peer, sock, shared, fds[1:], False, spin_us)


def check_ring_bytes(ring_bytes: int) -> None:
    """ValueError unless a ring may have this size."""
    if not MIN_RING_BYTES <= ring_bytes <= MAX_RING_BYTES or ring_bytes % mmap.PAGESIZE:
        raise ValueError(
            f"ring_bytes is {ring_bytes}; allowed are multiples of {mmap.PAGESIZE} "
            f"from {MIN_RING_BYTES} to {MAX_RING_BYTES}"
        )


def _require_rings(memory: int, ring_bytes: int, peer: str) -> None:
    try:
        check_ring_bytes(ring_bytes)
    except ValueError as error:
        raise HandshakeRefused(f"from {peer!r}: {error}") from None
    size = os.fstat(memory).st_size
    if size != 2 * ring_bytes:
        raise HandshakeRefused(f"{peer!r} announced rings of {ring_bytes} bytes and sent {size} bytes of memory")
    # Without the seal the peer could shrink the memory under us: a SIGBUS instead of an error.
    if not fcntl.fcntl(memory, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise HandshakeRefused(f"{peer!r} sent memory that is not sealed against shrinking")


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
