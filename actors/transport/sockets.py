"""Exact reads and writes on non-blocking sockets, under a deadline. Used before a wire exists."""

from __future__ import annotations

import errno
import select
import socket
import time

from actors.transport.base import PeerGone, WireTimeout


def wait_for(sock: socket.socket, events: int, deadline: float, what: str) -> None:
    """Block until ``events`` (select.POLLIN or POLLOUT) hold. Errors: WireTimeout naming ``what``."""
    poller = select.poll()
    poller.register(sock, events)
    left = deadline - time.monotonic()
    if left <= 0.0 or not poller.poll(min(left, 3600.0) * 1000.0):
        raise WireTimeout(f"{what}: the deadline passed")


def send_exact(sock: socket.socket, data: bytes, deadline: float, what: str) -> None:
    """Write all of ``data``. Errors: WireTimeout, PeerGone, both naming ``what``."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            wait_for(sock, select.POLLOUT, deadline, what)
        except (BrokenPipeError, ConnectionResetError):
            raise PeerGone(f"{what}: the other side closed the connection") from None


def recv_exact(sock: socket.socket, size: int, deadline: float, what: str) -> bytes:
    """Read exactly ``size`` bytes. Errors: WireTimeout, PeerGone, both naming ``what``."""
    data = bytearray()
    while len(data) < size:
        # Before the read, not only when it would block: a client that drips bytes must not outlive the
        # deadline.
        wait_for(sock, select.POLLIN, deadline, what)
        try:
            piece = sock.recv(size - len(data))
        except BlockingIOError:
            continue
        except ConnectionResetError:
            piece = b""
        if not piece:
            raise PeerGone(f"{what}: the other side closed the connection")
        data += piece
    return bytes(data)


def shutdown(sock: socket.socket) -> None:
    """End both directions at once: waiting threads of both ends wake. Does nothing where the peer already
    did.
    """
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
