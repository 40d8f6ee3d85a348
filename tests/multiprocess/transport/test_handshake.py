"""Who gets a wire and who does not, and that the latter delay nobody."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import struct
import threading
import time

import pytest

from actors.transport.base import (
    HandshakeRefused,
    Medium,
    WireTimeout,
)
from actors.transport.endpoint import MAX_HANDSHAKES, Endpoint
from actors.transport.frame import PROTOCOL_VERSION
from actors.transport.handshake import answer, greet
from tests.multiprocess.transport.remote import NODE, SECRET, soon
from tests.multiprocess.transport.servers import Server, ended, impostor


@pytest.mark.parametrize("medium", [Medium.SHM, Medium.TCP])
@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(9)])
def test_a_stranger_is_shown_out_at_once(server: Server, medium: Medium, words: bytes) -> None:
    start = time.monotonic()
    with server.dial(medium) as sock:
        sock.sendall(words)
        assert ended(sock) == b""
    assert time.monotonic() - start < 1.5
    server.check(medium)


def test_the_log_names_the_address_of_a_refused_client(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.dial(Medium.TCP) as sock:
        host, port = sock.getsockname()
        sock.sendall(b"GET / ")
        ended(sock)
    server.endpoint.close()  # joins the thread that writes the line
    (line,) = caplog.messages
    assert line.startswith(f"endpoint server refused a tcp client at {host}:{port}: handshake with a client: it began")


@pytest.mark.parametrize("medium", [Medium.SHM, Medium.TCP])
def test_silence_and_dripping_are_bounded_and_delay_nobody(server: Server, medium: Medium) -> None:
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.dial(medium)) for _ in range(10)]
        dripping = stack.enter_context(server.dial(medium))
        hello = struct.pack("<4sHB", b"EXMH", PROTOCOL_VERSION, 1) + bytes(200)
        server.check(Medium.SHM)
        server.check(Medium.TCP)
        dripped = 0
        while not select.select([dripping], [], [], 0.05)[0]:
            dripping.send(hello[dripped : dripped + 1])
            dripped += 1
        assert dripped < 80
        for sock in (dripping, *silent):
            assert ended(sock) == b""
    assert 1.5 < time.monotonic() - start < 10.0


def test_a_flood_of_silence_does_not_lock_honest_clients_out(server: Server) -> None:
    others = threading.active_count() - 1  # the endpoint's own is there already
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.dial(Medium.TCP))
        for _ in range(MAX_HANDSHAKES + 20):
            stack.enter_context(server.dial(Medium.TCP))
        start = time.monotonic()
        assert ended(first) == b""
        assert time.monotonic() - start < 1.5, "the oldest goes first, before its two seconds"
        server.check(Medium.TCP)
        assert threading.active_count() <= others + MAX_HANDSHAKES + 1
        start = time.monotonic()
        server.endpoint.close()
        assert time.monotonic() - start < 1.0, "close waits for nobody's two seconds"
    assert threading.active_count() == others


@pytest.mark.parametrize("medium", [Medium.SHM, Medium.TCP])
def test_a_wrong_secret_is_refused_with_the_reason(server: Server, medium: Medium) -> None:
    liar = Endpoint("client", NODE, b"another secret!!")
    with pytest.raises(HandshakeRefused, match="does not know the secret"):
        liar.connect(server.address, soon(), medium)
    liar.close()
    server.check(medium)


def test_a_wrong_version_is_refused_and_told(server: Server) -> None:
    with server.dial(Medium.TCP) as sock:
        sock.setblocking(False)
        text = f"client speaks version {PROTOCOL_VERSION + 1}, this end {PROTOCOL_VERSION}"
        with pytest.raises(HandshakeRefused, match=text):
            greet(sock, Medium.TCP, "client", "server", SECRET, soon(), version=PROTOCOL_VERSION + 1)


def test_another_name_and_another_medium_are_refused(server: Server) -> None:
    moved = dataclasses.replace(server.address, name="somebody else")
    with pytest.raises(HandshakeRefused, match="another endpoint listens here"):
        server.client.connect(moved, soon())
    with server.dial(Medium.TCP) as sock:
        sock.setblocking(False)
        with pytest.raises(HandshakeRefused, match="listener is for tcp"):
            greet(sock, Medium.SHM, "client", "server", SECRET, soon())


def test_a_proof_cannot_be_replayed(server: Server) -> None:
    """The same bytes that once convinced the server do not convince it again: its challenge is new."""
    recorded: list[bytes] = []
    for attempt in range(2):
        with server.dial(Medium.TCP) as sock:
            sock.setblocking(False)
            if attempt == 0:
                greet(_Recorder(sock, recorded), Medium.TCP, "client", "server", SECRET, soon())  # type: ignore[arg-type]
                continue
            for message in recorded:
                sock.sendall(message)
            sock.setblocking(True)
            assert b"does not know the secret" in ended(sock)
    server.wires.get(timeout=10).close()


class _Recorder:
    """A socket that keeps what is sent."""

    def __init__(self, sock: socket.socket, into: list[bytes]) -> None:
        self._sock, self._into = sock, into

    def send(self, data: memoryview, flags: int) -> int:
        count = self._sock.send(data, flags)
        self._into.append(bytes(data[:count]))
        return count

    def recv(self, size: int) -> bytes:
        return self._sock.recv(size)

    def fileno(self) -> int:
        return self._sock.fileno()


def test_a_server_without_the_secret_is_found_out(server: Server) -> None:
    def pretend(sock: socket.socket) -> None:
        sock.setblocking(False)
        answer(sock, Medium.TCP, "server", b"a guess at a secret", soon())

    def accept_anything(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(struct.pack("<4sHBB32s", b"EXMH", PROTOCOL_VERSION, 0, 0, bytes(32)))
        sock.recv(4096)
        sock.sendall(bytes(34))
        ended(sock)

    def speak_http(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        ended(sock)

    for serve, text in (
        (pretend, "does not know the secret"),
        (accept_anything, "it does not know the secret"),
        (speak_http, "not one of ours"),
    ):
        with impostor(serve) as address, pytest.raises(HandshakeRefused, match=text):
            server.client.connect(address, soon())


def test_a_silent_server_is_a_timeout(server: Server) -> None:
    def serve(sock: socket.socket) -> None:
        ended(sock)

    start = time.monotonic()
    with impostor(serve) as address, pytest.raises(WireTimeout, match="server"):
        server.client.connect(address, start + 0.2)
    assert time.monotonic() - start < 1.5
