"""The wire between nodes: one TCP connection, vectored writes, reads straight into the frame's memory.

Several connections for large frames do not pay where it was measured: 64 MiB over loopback on 2 cores, a thread for
each connection at both ends, went at 3.6 GB/s over one, over two and over four of them.
"""

from __future__ import annotations

import socket
from collections import deque

from actors.transport.base import Medium, PeerGone
from actors.transport.sockets import shutdown
from actors.transport.stream import StreamWire, poll_on

_PROBE_AFTER_S = 5
_VANISHED_AFTER_S = 20

_STAGE_BYTES = 64 << 10
"""Small reads go through a stage, so that a header and a small payload cost one system call together."""

READ_BYTES = _STAGE_BYTES // 2
"""Every read has room for at least so many bytes: targets that have less are filled from the stage."""


class TcpWire(StreamWire):
    """Takes over a connected, non-blocking, authenticated socket."""

    def __init__(self, peer: str, sock: socket.socket, spin_us: float, medium: Medium = Medium.TCP) -> None:
        super().__init__(peer, medium, spin_us)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that vanished sends no FIN: probes, and data that stays unacknowledged, end the wire instead.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_AFTER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _VANISHED_AFTER_S * 1000)
        self._sock = sock
        self._stage = memoryview(bytearray(_STAGE_BYTES))
        self._staged = self._stage[:0]
        fd = sock.fileno()
        self._poll_recv = poll_on((fd,))
        self._poll_send = poll_on((fd,), (fd,))
        self._poll_room = poll_on((), (fd,))

    def filenos(self) -> tuple[int, ...]:
        """See :meth:`Wire.filenos`."""
        return () if self._freed else (self._sock.fileno(),)

    def _push(self, outgoing: deque[memoryview]) -> bool:
        try:
            count = self._sock.sendmsg(outgoing, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            self._set_end(PeerGone, f"sending to {self.peer!r} over {self.medium}: {error}")
            return False
        take_off(outgoing, count)
        return True

    def _pull(self, target: memoryview) -> int:
        if not self._staged:
            if len(target) >= READ_BYTES:
                return self._read(target)
            self._staged = self._stage[: self._read(self._stage)]
        count = min(len(self._staged), len(target))
        target[:count] = self._staged[:count]
        self._staged = self._staged[count:]
        return count

    def _in_hand(self) -> bool:
        return bool(self._staged)

    def _read(self, target: memoryview) -> int:
        try:
            count = self._sock.recv_into(target)
        except BlockingIOError:
            return 0
        except OSError as error:
            # Timeouts of the network and resets alike: the connection is over, and the reason is in the text.
            self._set_end(PeerGone, f"receiving from {self.peer!r} over {self.medium}: {error}")
            return 0
        if count == 0:
            self._end_by_peer()
        return count

    def _end_by_peer(self) -> None:
        self._set_end(PeerGone, f"{self.peer!r} closed its {self.medium} wire or died")

    def _look_for_end(self) -> None:
        """Nothing to do: ``_read`` has met the end of the stream if it is there."""

    def _interrupt(self) -> None:
        shutdown(self._sock)

    def _free(self) -> None:
        self._sock.close()


def take_off(outgoing: deque[memoryview], count: int) -> None:
    """``count`` bytes of the front are out."""
    while count:
        view = outgoing.popleft()
        if len(view) > count:
            outgoing.appendleft(view[count:])
            return
        count -= len(view)
