"""A communicator that behaves as NCCL does, over host memory and Unix sockets, between real processes.

What it takes over of NCCL's habits, since the wire must live with them (see ``actors.transport.communicator``):
joining hangs until all ranks came; the first transfer of a pair blocks inside ``exchange`` until the peer posts one
to us as well; ``exchange`` otherwise returns at once; exchanges of a communicator run one after the other and the
transfers of one exchange side by side; a transfer needs both sides and equal counts, else it hangs, a dead peer
included, until ``abort``; after that everything pending says done, and what was to be received is garbage.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from actors.transport.communicator import Communicator, CommunicatorError, Transfer

GARBAGE = 0xAB

_MESSAGE = struct.Struct("<cQ")
_JOIN = struct.Struct("<II")
_READY, _DATA = b"R", b"D"


def _named(name: str) -> str:
    return f"\0nccl-double-{name}"


def _listener(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(_named(name))
    sock.listen(64)
    return sock


class DoubleBackend:
    """See :class:`actors.transport.communicator.Backend`."""

    device = torch.device("cpu")

    def unique_id(self) -> bytes:
        """See :class:`actors.transport.communicator.Backend`; a thread of this process answers those who join."""
        name = uuid.uuid4().hex
        threading.Thread(target=_gather, args=(_listener(name),), name="nccl-double-root", daemon=True).start()
        return name.encode()

    def connect(self, unique_id: bytes, rank: int, size: int) -> DoubleCommunicator:
        """See :class:`actors.transport.communicator.Backend`."""
        name = unique_id.decode()
        listener = _listener(f"{name}-{rank}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as root:
            try:
                root.connect(_named(name))
                root.sendall(_JOIN.pack(rank, size))
                gathered = root.recv(1)
            except OSError as error:
                listener.close()
                raise CommunicatorError(f"nobody answers for this id: {error}") from error
        if not gathered:
            listener.close()
            raise CommunicatorError("the process that made the id is gone")
        return DoubleCommunicator(name, rank, size, listener)

    def abort(self, communicators: Sequence[Communicator]) -> None:
        """See :class:`actors.transport.communicator.Backend`."""
        for communicator in communicators:
            assert isinstance(communicator, DoubleCommunicator)
            communicator.abort()


def _gather(listener: socket.socket) -> None:
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        size = 1
        while len(came) < size:
            sock = stack.enter_context(listener.accept()[0])
            joined = sock.recv(_JOIN.size, socket.MSG_WAITALL)
            if len(joined) == _JOIN.size:
                rank, size = _JOIN.unpack(joined)
                came[rank] = sock
        for sock in came.values():
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"!")


@dataclass
class _Link:
    """The socket to one peer and what is to go or come over it."""

    sock: socket.socket
    outgoing: deque[tuple[memoryview, DoublePending | None]] = field(default_factory=deque)
    sends: deque[tuple[memoryview, DoublePending]] = field(default_factory=deque)
    receives: deque[tuple[memoryview, DoublePending]] = field(default_factory=deque)
    ready: deque[int] = field(default_factory=deque)
    head: bytearray = field(default_factory=bytearray)
    target: memoryview | None = None
    dead: bool = False


class DoublePending:
    """See :class:`actors.transport.communicator.Pending`."""

    def __init__(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> None:
        self.sends, self.receives = sends, receives
        self.left = len(sends) + len(receives)
        self.over = self.left == 0

    def done(self) -> bool:
        """See :class:`actors.transport.communicator.Pending`."""
        return self.over


class DoubleCommunicator:
    """See :class:`actors.transport.communicator.Communicator`. ``broken`` is what ``failure`` reports."""

    def __init__(self, name: str, rank: int, size: int, listener: socket.socket) -> None:
        self.rank, self.size = rank, size
        self.broken: str | None = None
        self._name = name
        self._listener = listener
        self._listener.setblocking(False)
        self._links: dict[int, _Link] = {}
        self._called: dict[int, socket.socket] = {}
        self._queue: deque[DoublePending] = deque()
        self._active: DoublePending | None = None
        self._aborted = False
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._abort_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="nccl-double", daemon=True)
        self._thread.start()

    def exchange(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> DoublePending:
        """See :class:`actors.transport.communicator.Communicator`."""
        for transfer in (*sends, *receives):
            if not 0 <= transfer.peer < self.size or transfer.peer == self.rank:
                raise CommunicatorError(f"rank {self.rank} of {self.size} cannot talk to rank {transfer.peer}")
            if transfer.peer not in self._links and not self._linked(transfer.peer):
                break  # aborted
        pending = DoublePending(sends, receives)
        with self._lock:
            if self._aborted:
                pending.over = True
            self._queue.append(pending)
        self._wake()
        return pending

    def failure(self) -> str | None:
        """See :class:`actors.transport.communicator.Communicator`."""
        return self.broken

    def abort(self) -> None:
        """Local, from any thread."""
        os.eventfd_write(self._abort_fd, 1)
        with self._lock:
            assert not self._aborted, "a communicator was aborted twice: NCCL would crash"
            self._aborted = True
        self._wake()
        self._thread.join()
        for pending in (*([self._active] if self._active else ()), *self._queue):
            for transfer in () if pending.over else pending.receives:  # what has arrived may be in use by now
                transfer.tensor.numpy().fill(GARBAGE)
            pending.over = True
        for sock in (self._listener, *self._called.values(), *(link.sock for link in self._links.values())):
            sock.close()

    def __del__(self) -> None:
        os.close(self._wake_fd)
        os.close(self._abort_fd)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # -- connecting on demand: both ends must be inside exchange ---------------------------------------------------

    def _linked(self, peer: int) -> bool:
        sock = self._dial(peer) if self.rank < peer else self._accept(peer)
        if sock is None:
            return False
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._links[peer] = _Link(sock)
        return True

    def _dial(self, peer: int) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(_named(f"{self._name}-{peer}"))
            sock.sendall(bytes([self.rank]))
        except OSError:
            select.select([self._abort_fd], [], [])  # it died: hang
        if self._waited(sock) and sock.recv(1):
            return sock
        select.select([self._abort_fd], [], [])
        sock.close()
        return None

    def _accept(self, peer: int) -> socket.socket | None:
        while peer not in self._called:
            if not self._waited(self._listener):
                return None
            sock = self._listener.accept()[0]
            self._called[sock.recv(1)[0]] = sock
        sock = self._called.pop(peer)
        with contextlib.suppress(ConnectionError):
            sock.sendall(b"!")
        return sock

    def _waited(self, sock: socket.socket) -> bool:
        """False when aborted."""
        return self._abort_fd not in select.select([sock.fileno(), self._abort_fd], [], [])[0]

    # -- progress --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._aborted:
            while self._begin_next() or self._progress():
                pass
            self._sleep()

    def _sleep(self) -> None:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        for link in list(self._links.values()):
            if not link.dead:
                poller.register(link.sock, select.POLLIN | (select.POLLOUT if link.outgoing else 0))
        poller.poll()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _begin_next(self) -> bool:
        with self._lock:
            if self._aborted or not self._queue or (self._active is not None and self._active.left):
                return False
            pending = self._active = self._queue.popleft()
        for tensor, peer in pending.receives:
            self._links[peer].receives.append((tensor.numpy().data, pending))
            self._links[peer].outgoing.append((memoryview(_MESSAGE.pack(_READY, tensor.numel())), None))
        for tensor, peer in pending.sends:
            self._links[peer].sends.append((tensor.numpy().data, pending))
        return True

    def _progress(self) -> bool:
        moved = [self._read(link) | self._match(link) | self._write(link) for link in list(self._links.values())]
        return any(moved) and not self._aborted

    def _match(self, link: _Link) -> bool:
        """A send goes once the peer is ready for as many bytes; for any other number neither ever goes on."""
        if not link.sends or not link.ready or link.ready[0] != len(link.sends[0][0]):
            return False
        view, pending = link.sends.popleft()
        link.outgoing.append((memoryview(_MESSAGE.pack(_DATA, link.ready.popleft())), None))
        link.outgoing.append((view, pending))
        return True

    def _write(self, link: _Link) -> bool:
        moved = False
        while link.outgoing and not link.dead:
            view, pending = link.outgoing[0]
            try:
                count = link.sock.send(view, socket.MSG_NOSIGNAL) if view else 0
            except BlockingIOError:
                return moved
            except OSError:
                link.dead = True
                return moved
            moved = True
            if count < len(view):
                link.outgoing[0] = (view[count:], pending)
                continue
            link.outgoing.popleft()
            self._ended(pending)
        return moved

    def _read(self, link: _Link) -> bool:
        moved = False
        while not link.dead:
            try:
                if link.target is not None:
                    count = link.sock.recv_into(link.target)
                    link.target = link.target[count:]
                else:
                    got = link.sock.recv(_MESSAGE.size - len(link.head))
                    link.head += got
                    count = len(got)
            except BlockingIOError:
                return moved
            except OSError:
                count = 0
            if count == 0:
                link.dead = True
                return moved
            moved = True
            self._took(link)
        return moved

    def _took(self, link: _Link) -> None:
        if link.target is None and len(link.head) == _MESSAGE.size:
            word, count = _MESSAGE.unpack(link.head)
            link.head.clear()
            if word == _READY:
                link.ready.append(count)
            else:
                link.target = link.receives[0][0]
        if link.target is not None and not link.target:
            link.target = None
            self._ended(link.receives.popleft()[1])

    def _ended(self, pending: DoublePending | None) -> None:
        if pending is None:
            return
        pending.left -= 1
        if pending.left == 0:
            pending.over = True
