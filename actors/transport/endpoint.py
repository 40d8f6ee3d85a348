"""Where wires between processes come from: two listeners, a bounded number of handshakes, and ``connect``."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import ssl
import struct
import threading
import time
import uuid
from collections.abc import Callable

from actors.transport.base import (
    Address,
    HandshakeRefused,
    Medium,
    PeerGone,
    TransportError,
    Wire,
    WireTimeout,
)
from actors.transport.handshake import HANDSHAKE_SECONDS, answer, greet, name_bytes, require_same_user
from actors.transport.refusals import RefusalLog
from actors.transport.shm import adopt, check_ring_bytes, offer
from actors.transport.sockets import shutdown, wait_for
from actors.transport.tcp import TcpWire
from actors.transport.tls import WireTls, shake_hands
from actors.transport.tls_wire import TlsWire

MAX_HANDSHAKES = 64
"""So many clients may be in their handshake at once; one more ends the oldest, which is surely no honest one.
"""

_BACKLOG = 128
_TIMEVAL = struct.Struct("@ll")
_TABLES_FULL = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

log = logging.getLogger(__name__)


class Endpoint:
    """An :class:`~.base.EndpointLike` over shared memory and TCP.

    ``node_id`` must be equal exactly where memory can be shared, ``secret`` is the cluster's and at least 16
    bytes. TCP listens on ``host``, which is also what others are told (a wildcard is refused: nobody could
    connect to it); port 0 lets the kernel choose. ``on_wire`` is called with each incoming wire in the
    short-lived thread of its handshake and must not block; without one the endpoint does not listen and only
    connects. With ``tls`` there is no plain TCP: wires to and from other nodes are of the medium TLS.
    ``ring_bytes`` is the shared memory per direction of the wires that this end connects, ``spin_us`` see
    :class:`~.waiting.Waiter`.
    """

    def __init__(
        self,
        name: str,
        node_id: str,
        secret: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        on_wire: Callable[[Wire], None] | None = None,
        ring_bytes: int = 4 << 20,
        media: frozenset[Medium] = frozenset({Medium.SHM, Medium.TCP}),
        spin_us: float = 50.0,
        tls: WireTls | None = None,
    ) -> None:
        """Errors: ValueError naming the argument; OSError when the address cannot be bound."""
        _check_arguments(name, secret, host, media)
        check_ring_bytes(ring_bytes)
        self._name, self._node_id, self._secret = name, node_id, secret
        self._on_wire = on_wire
        self._ring_bytes, self._media, self._spin_us = ring_bytes, media, spin_us
        self._tls = tls
        self._network = Medium.TCP if tls is None else Medium.TLS
        self._lock = threading.Lock()
        self._closed = False
        self._refusals = RefusalLog(name)
        self._handshakes: dict[threading.Thread, socket.socket] = {}
        self._listeners: dict[int, tuple[socket.socket, Medium]] = {}
        self._address = Address(name, node_id)
        self._acceptor: threading.Thread | None = None
        if on_wire is not None:
            self._listen(host, port)

    @property
    def address(self) -> Address:
        """See :class:`~.base.EndpointLike`."""
        return self._address

    def connect(self, address: Address, deadline: float, medium: Medium | None = None) -> Wire:
        """See :class:`~.base.EndpointLike`. None picks shm where the node ids are equal, else tcp or TLS."""
        chosen = self._choose(address, medium)
        sock = _dial_unix(address, deadline) if chosen is Medium.SHM else self._dial_network(address, deadline)
        try:
            if isinstance(sock, ssl.SSLSocket):
                shake_hands(sock, deadline, f"handshake with {address.name!r}")
            greet(sock, chosen, self._name, address.name, self._secret, deadline)
            if chosen is Medium.SHM:
                return offer(sock, address.name, self._ring_bytes, self._spin_us, deadline)
            return self._network_wire(address.name, sock)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Stop listening, end the handshakes under way, join all threads. Wires stay with their owners."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for sock in self._handshakes.values():
                shutdown(sock)
            threads = list(self._handshakes)
        if self._acceptor is None:
            return
        os.eventfd_write(self._wake_fd, 1)
        for thread in (self._acceptor, *threads):
            if thread is not threading.current_thread():
                thread.join()
        for listener, _ in self._listeners.values():
            listener.close()
        os.close(self._wake_fd)

    def _listen(self, host: str, port: int) -> None:
        unix_name, bound = "", 0
        if Medium.SHM in self._media:
            unix_name = f"expertmesh-{uuid.uuid4().hex}"
            self._add_listener(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), "\0" + unix_name, Medium.SHM)
        if Medium.TCP in self._media:
            sock = socket.socket(_family(host), socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._add_listener(sock, (host, port), self._network)
            bound = sock.getsockname()[1]
        self._address = Address(self._name, self._node_id, host if bound else "", bound, unix_name)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._acceptor = threading.Thread(target=self._accept_all, name=f"accept {self._name}", daemon=True)
        self._acceptor.start()

    def _add_listener(self, sock: socket.socket, where: str | tuple[str, int], medium: Medium) -> None:
        try:
            sock.setblocking(False)
            sock.bind(where)
            sock.listen(_BACKLOG)
        except OSError:
            for listener in (sock, *(other for other, _ in self._listeners.values())):
                listener.close()
            raise
        self._listeners[sock.fileno()] = (sock, medium)

    def _choose(self, address: Address, medium: Medium | None) -> Medium:
        usable = set()
        if Medium.SHM in self._media and address.unix_name and address.node_id == self._node_id:
            usable.add(Medium.SHM)
        if Medium.TCP in self._media and address.port:
            usable.add(self._network)
        if medium is None and usable:
            return Medium.SHM if Medium.SHM in usable else self._network
        if medium is not None and medium in usable:
            return medium
        raise HandshakeRefused(
            f"{medium or 'any medium'} to {address.name!r} on node {address.node_id!r}: usable from "
            f"{self._name!r} on node {self._node_id!r} are: {', '.join(sorted(usable)) or 'none'}"
        )

    def _dial_network(self, address: Address, deadline: float) -> socket.socket:
        sock = _dial_tcp(address, deadline)
        return sock if self._tls is None else self._tls.wrap(sock, False, f"connecting to {address.name!r}")

    def _network_wire(self, peer: str, sock: socket.socket) -> TcpWire:
        if isinstance(sock, ssl.SSLSocket):
            return TlsWire(peer, sock, self._spin_us)
        return TcpWire(peer, sock, self._spin_us)

    def _accept_all(self) -> None:
        poller = select.poll()
        for fd in (*self._listeners, self._wake_fd):
            poller.register(fd, select.POLLIN)
        while not self._closed:
            for fd, _ in poller.poll():
                if fd in self._listeners:
                    self._accept_one(*self._listeners[fd])

    def _accept_one(self, listener: socket.socket, medium: Medium) -> None:
        try:
            sock, whence = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _TABLES_FULL:
                raise
            log.error("endpoint %s cannot accept: %s", self._name, error)
            # The client stays in the backlog, so without a pause this would spin; close() ends the pause.
            select.select([self._wake_fd], [], [], 0.1)
            return
        sock.setblocking(False)
        client = f"{medium} client at {whence[0]}:{whence[1]}" if whence else f"{medium} client"
        if self._tls is not None and medium is Medium.TLS:
            try:
                sock = self._tls.wrap(sock, True, "handshake with a client")
            except PeerGone as error:
                self._refusals.refused(client, error)
                return
        self._end_oldest_of_too_many()
        thread = threading.Thread(target=self._shake_hands, args=(sock, medium, client), daemon=True)
        with self._lock:
            if self._closed:
                sock.close()
                return
            self._handshakes[thread] = sock
            thread.start()

    def _end_oldest_of_too_many(self) -> None:
        with self._lock:
            if len(self._handshakes) < MAX_HANDSHAKES:
                return
            thread, sock = next(iter(self._handshakes.items()))
            shutdown(sock)
        thread.join()

    def _shake_hands(self, sock: socket.socket, medium: Medium, client: str) -> None:
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        try:
            wire = self._answered(sock, medium, deadline)
        except (TransportError, OSError) as error:
            self._refusals.refused(client, error)
            wire = None
        with self._lock:
            # From here on close() must not shut this socket down: it is a wire's, or closed.
            del self._handshakes[threading.current_thread()]
            if wire is None:
                sock.close()
        if wire is None:
            return
        if self._closed:
            wire.close()
            return
        assert self._on_wire is not None
        self._on_wire(wire)

    def _answered(self, sock: socket.socket, medium: Medium, deadline: float) -> Wire:
        if medium is Medium.SHM:
            require_same_user(sock)
        if isinstance(sock, ssl.SSLSocket):
            shake_hands(sock, deadline, "handshake with a client")
        peer = answer(sock, medium, self._name, self._secret, deadline)
        if medium is Medium.SHM:
            return adopt(sock, peer, self._spin_us, deadline)
        return self._network_wire(peer, sock)


def _check_arguments(name: str, secret: bytes, host: str, media: frozenset[Medium]) -> None:
    name_bytes(name)
    if len(secret) < 16:
        raise ValueError(f"secret has {len(secret)} bytes; at least 16 are needed")
    if host in ("", "0.0.0.0", "::"):
        raise ValueError(f"host is {host!r}; give the address under which other nodes reach this one")
    if not media or not media <= {Medium.SHM, Medium.TCP}:
        raise ValueError(f"media is {', '.join(sorted(media)) or 'empty'}; allowed are shm, tcp or both")


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def _dial_unix(address: Address, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A full backlog makes connect() wait, which poll cannot see: let the kernel bound that wait.
        left = max(deadline - time.monotonic(), 1e-3)
        seconds = int(min(left, 3600.0))
        wait = _TIMEVAL.pack(seconds, int((min(left, 3600.0) - seconds) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        sock.connect("\0" + address.unix_name)
        sock.setblocking(False)
        require_same_user(sock)
    except BlockingIOError:
        sock.close()
        raise WireTimeout(f"connecting to {address.name!r} over shm: the deadline passed") from None
    except OSError as error:
        sock.close()
        raise PeerGone(f"nobody listens for {address.name!r} on this node: {error}") from None
    except HandshakeRefused:
        sock.close()
        raise
    return sock


def _dial_tcp(address: Address, deadline: float) -> socket.socket:
    what = f"connecting to {address.name!r} at {address.host}:{address.port}"
    sock = socket.socket(_family(address.host), socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        failure = sock.connect_ex((address.host, address.port))
        if failure == errno.EINPROGRESS:
            wait_for(sock, select.POLLOUT, deadline, what)
            failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise PeerGone(f"{what}: {os.strerror(failure)}")
    except BaseException:
        sock.close()
        raise
    return sock
