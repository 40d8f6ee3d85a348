"""TLS between actors: one certificate for all of them or one for each node, signed by the cluster's own authority.

Both ends show a certificate and check the other's against that authority alone. Names are not compared: addresses of
nodes come and go, and whom one speaks to is settled by the hello that follows (``handshake.py``). TLS 1.3 only, without
session tickets: after the handshake nothing but records of frames is on the way.
"""

from __future__ import annotations

import select
import socket
import ssl
from contextlib import suppress
from pathlib import Path

from actors.transport.base import HandshakeRefused, PeerGone
from actors.transport.sockets import ENDED, tls_reason, wait_for

MAX_RECORD_BYTES = 16 << 10
"""Plaintext of one TLS record (RFC 8446, section 5.1)."""


class WireTls:
    """What an endpoint needs to encrypt its wires. ``certificate`` is a chain, leaf first; all three are PEM files."""

    def __init__(self, certificate: Path, key: Path, ca: Path) -> None:
        """Errors: OSError (ssl.SSLError among them) when a file cannot be read or does not fit the others."""
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, ca)
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, ca)
        self._server.num_tickets = 0

    def wrap(self, sock: socket.socket, server_side: bool, what: str) -> ssl.SSLSocket:
        """Take over a connected, non-blocking socket; nothing is sent before :func:`shake_hands`.

        Errors: PeerGone naming ``what`` (it has hung up already); the socket is closed then.
        """
        context = self._server if server_side else self._client
        try:
            sock.getpeername()  # wrap_socket would lose the descriptor of a connection that was reset
            return context.wrap_socket(sock, server_side, do_handshake_on_connect=False)
        except OSError as error:
            sock.close()
            raise PeerGone(f"{what}: {error}") from None

    def check(self) -> None:
        """Shake hands with itself: two ends with these files accept each other.

        Errors: ssl.SSLCertVerificationError (another authority, expired, not for both uses).
        """
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = self._client.wrap_bio(to_client, to_server)
        server = self._server.wrap_bio(to_server, to_client, server_side=True)
        for end in (client, server, client, server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()


def _context(protocol: int, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=ca)
    # The empty passphrase keeps an encrypted key from asking on the terminal.
    context.load_cert_chain(certificate, key, password="")
    return context


def shake_hands(sock: ssl.SSLSocket, deadline: float, what: str) -> None:
    """The TLS handshake of either end.

    A client returns before the server has looked at its certificate; it learns what came of that when it next reads.
    Errors, naming ``what``: HandshakeRefused (no TLS there, or a certificate of another authority), WireTimeout,
    PeerGone.
    """
    while True:
        try:
            sock.do_handshake()
            return
        except ssl.SSLWantReadError:
            wait_for(sock, select.POLLIN, deadline, what)
        except ssl.SSLWantWriteError:
            wait_for(sock, select.POLLOUT, deadline, what)
        except ENDED:
            raise PeerGone(f"{what}: the other side closed the connection in the TLS handshake") from None
        except ssl.SSLError as error:
            raise HandshakeRefused(f"{what}: TLS: {tls_reason(error)}") from None
        except OSError as error:
            raise PeerGone(f"{what}: {error}") from None
