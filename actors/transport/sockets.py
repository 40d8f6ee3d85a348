"""Exact reads and writes on non-blocking sockets, plain or TLS, under a deadline. Used before a wire exists."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import time

from actors.transport.base import HandshakeRefused, PeerGone, WireTimeout

ENDED = (ssl.SSLEOFError, ssl.SSLZeroReturnError, BrokenPipeError, ConnectionResetError)
"""How a stream may tell that the other side has closed it, beside reading nothing."""

NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""How a socket tells that a call would have to wait. After a TLS handshake a read waits for input alone and a write for
room alone: TLS 1.3 has no renegotiation, and neither end asks for new keys.
"""


def wait_for(sock: socket.socket, events: int, deadline: float, what: str) -> None:
    """Block until ``events`` (select.POLLIN or POLLOUT) hold. Errors: WireTimeout naming ``what``."""
    poller = select.poll()
    poller.register(sock, events)
    left = deadline - time.monotonic()
    if left <= 0.0 or not poller.poll(min(left, 3600.0) * 1000.0):
        raise WireTimeout(f"{what}: the deadline passed")


def send_exact(sock: socket.socket, data: bytes, deadline: float, what: str) -> None:
    """Write all of ``data``. Errors: WireTimeout, PeerGone, HandshakeRefused (by TLS), all naming ``what``."""
    flags = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_NOSIGNAL  # TLS sockets take none
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view, flags) :]
        except NOT_YET:
            wait_for(sock, select.POLLOUT, deadline, what)
        except ENDED:
            raise PeerGone(f"{what}: the other side closed the connection") from None
        except ssl.SSLError as error:
            raise HandshakeRefused(f"{what}: TLS: {tls_reason(error)}") from None


def recv_exact(sock: socket.socket, size: int, deadline: float, what: str) -> bytes:
    """Read exactly ``size`` bytes. Errors: WireTimeout, PeerGone, HandshakeRefused (by TLS), all naming ``what``."""
    data = bytearray()
    while len(data) < size:
        # Before the read, not only when it would block: a client that drips bytes must not outlive the
        # deadline. What TLS has in hand shows on no descriptor.
        if not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            wait_for(sock, select.POLLIN, deadline, what)
        try:
            piece = sock.recv(size - len(data))
        except NOT_YET:
            continue
        except ENDED:
            piece = b""
        except ssl.SSLError as error:
            raise HandshakeRefused(f"{what}: TLS: {tls_reason(error)}") from None
        if not piece:
            raise PeerGone(f"{what}: the other side closed the connection")
        data += piece
    return bytes(data)


def tls_reason(error: ssl.SSLError) -> str:
    """What went wrong, without the library's own line numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the other side's certificate is not accepted: {error.verify_message}"
    return (error.reason or str(error)).replace("_", " ").lower()


def shutdown(sock: socket.socket) -> None:
    """End both directions at once: waiting threads of both ends wake. Does nothing where the peer already
    did.
    """
    try:
        # Not the method of a TLS socket, which would pull its state away from under a call of another thread.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
