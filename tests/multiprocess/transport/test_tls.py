"""TLS between actors: who is let in, what is seen on the way, and how records carry frames."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from actors.transport.base import (
    FrameTag,
    HandshakeRefused,
    Medium,
    PeerGone,
    ProtocolError,
    Wire,
    WireTimeout,
)
from actors.transport.blocks import footprint
from actors.transport.endpoint import MAX_HANDSHAKES, Endpoint
from actors.transport.frame import HEADER_BYTES, encode_header, filling
from actors.transport.handshake import greet
from actors.transport.poller import Poller
from actors.transport.tcp import READ_BYTES
from actors.transport.tls import MAX_RECORD_BYTES, WireTls, shake_hands
from tests.authority import Authority
from tests.multiprocess.transport.encrypted import folder, wire_tls
from tests.multiprocess.transport.remote import NODE, SECRET, payload, soon
from tests.multiprocess.transport.servers import Server, ended, impostor

TAG = FrameTag(epoch=1)
APPLICATION_DATA = 23
SOON = 1.5


@pytest.fixture
def tls() -> WireTls:
    return wire_tls(folder())


@pytest.fixture
def server(tls: WireTls) -> Iterator[Server]:
    """A server and a client under TLS, which leave no thread behind."""
    before = threading.active_count()
    server = Server(tls)
    yield server
    server.close()
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> WireTls:
    """Files that fit each other, of another authority."""
    path = tmp_path_factory.mktemp("foreign")
    Authority(path).sign("node")
    return WireTls(path / "node.pem", path / "node.key", path / "ca.pem")


def refused_soon(server: Server, client: Endpoint, *errors: type[Exception], match: str = "'server'") -> None:
    """``client`` gets no wire, quickly, and the next one of ours does."""
    start = time.monotonic()
    with pytest.raises(errors or HandshakeRefused, match=match):
        client.connect(server.address, soon(), Medium.TLS if client._tls else Medium.TCP)
    assert time.monotonic() - start < SOON
    client.close()
    server.check(Medium.TLS)


def test_the_network_medium_is_tls_and_no_other(server: Server) -> None:
    server.check(Medium.TLS)
    server.check(Medium.SHM)
    with pytest.raises(HandshakeRefused, match=r"^tcp to 'server' .*'client' .* are: shm, tcp\+tls$"):
        server.client.connect(server.address, soon(), Medium.TCP)
    elsewhere = Endpoint("client", "node-1", SECRET, tls=server.client._tls)
    wire = elsewhere.connect(server.address, soon())
    assert wire.medium is Medium.TLS
    wire.close()
    server.wires.get(timeout=10).close()
    elsewhere.close()


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"EXMH\x01\x00\x03" + bytes(60), bytes(9)])
def test_a_stranger_is_shown_out_at_once(server: Server, words: bytes) -> None:
    start = time.monotonic()
    with server.dial(Medium.TLS) as sock:
        sock.sendall(words)
        assert len(ended(sock)) <= 7, "an alert at most"
    assert time.monotonic() - start < SOON
    server.check(Medium.TLS)


def test_clients_that_hang_up_before_a_word_or_in_the_middle_delay_nobody(server: Server) -> None:
    for words in (b"", b"\x16\x03\x01\x02\x00\x01") * 10:
        with server.dial(Medium.TLS) as sock:
            sock.sendall(words)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a farewell
    server.check(Medium.TLS)


def test_a_plain_client_is_refused(server: Server) -> None:
    refused_soon(server, Endpoint("client", "node-1", SECRET), HandshakeRefused, PeerGone)


def test_a_client_of_another_authority_is_refused(server: Server, foreign: WireTls) -> None:
    client = Endpoint("client", "node-1", SECRET, tls=foreign)
    refused_soon(server, client, match="certificate is not accepted: self-signed certificate in certificate chain")


def careless(folder_of_pair: Path | None, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """What a stranger would use: it trusts every server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = newest
    if folder_of_pair is not None:
        context.load_cert_chain(folder_of_pair / "node.pem", folder_of_pair / "node.key")
    return context


def test_a_client_that_trusts_everybody_still_needs_a_certificate_of_ours(server: Server, tmp_path: Path) -> None:
    Authority(tmp_path).sign("node")
    for pair in (None, tmp_path):
        stranger = careless(pair).wrap_socket(server.dial(Medium.TLS))
        with stranger, pytest.raises((HandshakeRefused, PeerGone)):
            greet(stranger, Medium.TLS, "client", "server", SECRET, soon())
    server.check(Medium.TLS)


def ended_by_alert(sock: ssl.SSLSocket) -> bool:
    try:
        return sock.recv(1) == b""
    except (ssl.SSLError, ConnectionResetError):
        return True


def test_older_versions_are_refused(server: Server) -> None:
    with server.dial(Medium.TLS) as sock, pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        careless(folder(), ssl.TLSVersion.TLSv1_2).wrap_socket(sock)
    server.check(Medium.TLS)


def test_the_secret_is_asked_for_inside_tls(server: Server, tls: WireTls) -> None:
    client = Endpoint("client", NODE, b"another secret!!", tls=tls)
    refused_soon(server, client, match="does not know the secret")


def dial(server: Server, tls: WireTls) -> ssl.SSLSocket:
    """A client's socket after its TLS handshake."""
    raw = server.dial(Medium.TLS)
    raw.setblocking(False)
    sock = tls.wrap(raw, False, "a test")
    shake_hands(sock, soon(), "a test")
    return sock


def test_the_hello_is_for_this_medium(server: Server, tls: WireTls) -> None:
    """One that was made for plain TCP cannot be moved into TLS."""
    with dial(server, tls) as sock, pytest.raises(HandshakeRefused, match=r"listener is for tcp\+tls"):
        greet(sock, Medium.TCP, "client", "server", SECRET, soon())


def test_a_server_that_is_not_ours_is_found_out(server: Server, foreign: WireTls) -> None:
    def of_another_authority(sock: socket.socket) -> None:
        sock.setblocking(False)
        with foreign.wrap(sock, True, "a test") as wrapped:
            shake_hands(wrapped, soon(), "a test")

    def plain(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        ended(sock)

    for serve, text in ((of_another_authority, "certificate is not accepted"), (plain, "TLS: ")):
        with impostor(serve) as address, pytest.raises(HandshakeRefused, match=f"'server': .*{text}"):
            server.client.connect(replace(address, name="server"), soon())
    with impostor(lambda sock: None) as address, pytest.raises(PeerGone, match="'server'"):
        server.client.connect(address, soon())


def test_a_silent_server_is_a_timeout(server: Server) -> None:
    start = time.monotonic()
    with impostor(lambda sock: void(ended(sock))) as address, pytest.raises(WireTimeout, match="server"):
        server.client.connect(address, start + 0.2)
    assert time.monotonic() - start < SOON


def void(_: bytes) -> None:
    """A function of this type was wanted."""


def test_silence_and_half_a_handshake_are_bounded_and_delay_nobody(server: Server, tls: WireTls) -> None:
    """Silent before TLS, in the middle of its handshake, and after it: two seconds in all."""
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.dial(Medium.TLS)) for _ in range(5)]
        silent[0].sendall(b"\x16\x03\x01\x02\x00\x01")
        waiting = [stack.enter_context(dial(server, tls)) for _ in range(5)]
        server.check(Medium.TLS)
        for sock in (*silent, *waiting):
            sock.settimeout(10)
        assert all(len(ended(sock)) <= 7 for sock in silent)
        assert all(ended_by_alert(sock) for sock in waiting)
    assert 1.5 < time.monotonic() - start < 8.0


def test_a_flood_of_silence_does_not_lock_honest_clients_out(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.dial(Medium.TLS))
        for _ in range(MAX_HANDSHAKES + 10):
            stack.enter_context(server.dial(Medium.TLS))
        start = time.monotonic()
        ended(first)
        assert time.monotonic() - start < SOON, "the oldest goes first, before its two seconds"
        server.check(Medium.TLS)
        start = time.monotonic()
        server.endpoint.close()
        assert time.monotonic() - start < 1.0, "close waits for nobody's two seconds"


class Relay:
    """Stands between a client and the server, keeps what the client sends, and may change it."""

    def __init__(self, server: Server) -> None:
        self.seen = bytearray()
        self.change: Callable[[bytes], bytes] = bytes
        self._server = server
        self.server = server.dial(Medium.TLS)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def connect(self) -> tuple[Wire, Wire]:
        """The client's wire through the relay, and the server's."""
        port = self._listener.getsockname()[1]
        wire = self._server.client.connect(replace(self._server.address, port=port), soon(), Medium.TLS)
        return wire, self._server.wires.get(timeout=10)

    def records(self) -> list[tuple[int, int]]:
        """(type, length) of each whole TLS record that the client has sent."""
        found, at = [], 0
        while at + 5 <= len(self.seen):
            kind, _, length = struct.unpack_from(">BHH", self.seen, at)
            found.append((kind, length))
            at += 5 + length
        return found

    def close(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        with client, self.server:
            while True:
                for sock in select.select([client, self.server], [], [])[0]:
                    data = b""
                    with contextlib.suppress(ConnectionResetError):
                        data = sock.recv(1 << 16)
                    if not data:
                        return
                    if sock is client:
                        self.seen += data
                        self.server.sendall(self.change(data))
                    else:
                        client.sendall(data)


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    relay = Relay(server)
    yield relay
    relay.close()


def test_nothing_is_readable_on_the_way(relay: Relay) -> None:
    wire, accepted = relay.connect()
    words = b"activations of a prompt " * 40
    wire.send(1, TAG, [words], soon())
    assert bytes(accepted.recv(soon()).parts[0]) == words
    for secret in (b"activations", b"EXMH", b"EXM", b"server", SECRET):
        assert secret not in relay.seen
    wire.close()
    accepted.close()


def test_a_frame_is_as_few_records_as_it_can_be(relay: Relay) -> None:
    """Header and parts are coalesced: 8 small parts are one record, and large ones fill theirs."""
    wire, accepted = relay.connect()
    tag_and_type = 17  # of each record, RFC 8446, section 5.2
    for sizes, wanted in (((100,) * 8, 1), ((4096, 4096), 1), ((100_000,), 7), ((100, 20_000, 100), 2)):
        before = len(relay.records())
        wire.send(1, TAG, [payload(size, 1) for size in sizes], soon())
        assert [bytes(part) for part in accepted.recv(soon()).parts] == [payload(size, 1) for size in sizes]
        new = relay.records()[before:]
        assert {kind for kind, _ in new} == {APPLICATION_DATA}
        assert len(new) == wanted
        assert sum(length for _, length in new) == HEADER_BYTES + footprint(sizes) + wanted * tag_and_type
    wire.close()
    accepted.close()


def test_what_was_changed_on_the_way_ends_the_wire(relay: Relay) -> None:
    wire, accepted = relay.connect()
    wire.send(1, TAG, [b"first"], soon())
    assert bytes(accepted.recv(soon()).parts[0]) == b"first"
    relay.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    wire.send(1, TAG, [b"second"], soon())
    with pytest.raises(ProtocolError, match=r"from 'client' over tcp\+tls: .*bad record mac"):
        accepted.recv(soon())
    with pytest.raises(PeerGone):
        accepted.recv(soon())
    with pytest.raises((PeerGone, ProtocolError)):
        wire.recv(soon())
    wire.close()


def frame(kind: int, data: bytes) -> bytes:
    return encode_header(kind, TAG, [len(data)]) + data + filling(len(data))


def raw_link(server: Server, tls: WireTls) -> tuple[ssl.SSLSocket, Wire]:
    """A client's socket that has said its hello, and the server's wire."""
    sock = dial(server, tls)
    greet(sock, Medium.TLS, "client", "server", SECRET, soon())
    sock.setblocking(True)
    return sock, server.wires.get(timeout=10)


def test_a_read_has_room_for_a_record() -> None:
    """What a wire would leave in the TLS library rings no bell."""
    assert READ_BYTES >= MAX_RECORD_BYTES


def test_frames_that_share_a_record_do_not_wait_for_the_next(server: Server, tls: WireTls) -> None:
    """What TLS has in hand rings no bell: a poller and a bare recv see it all the same."""
    sock, wire = raw_link(server, tls)
    poller = Poller()
    poller.add(wire)
    sizes = (10, 0, 9000, 50)
    together = b"".join(frame(kind, payload(size, kind)) for kind, size in enumerate(sizes))
    assert len(together) < MAX_RECORD_BYTES
    for _ in range(3):
        sock.sendall(together)
        for kind, size in enumerate(sizes):
            assert poller.wait(soon(5.0)) == [wire]
            got = wire.recv(0.0)
            assert (got.kind, bytes(got.parts[0])) == (kind, payload(size, kind))
        assert poller.wait(soon(0.05)) == []
    poller.close()
    wire.close()
    sock.close()


def test_a_large_frame_and_the_head_of_the_next_in_one_record(server: Server, tls: WireTls) -> None:
    sock, wire = raw_link(server, tls)
    large, small = payload(40_000, 1), b"small"
    whole = frame(1, large) + frame(2, small)
    first = MAX_RECORD_BYTES
    sock.sendall(whole[:first])
    sock.sendall(whole[first:])
    poller = Poller()
    poller.add(wire)
    for kind, data in ((1, large), (2, small)):
        assert poller.wait(soon(5.0)) == [wire]
        got = wire.recv(soon(5.0))
        assert (got.kind, bytes(got.parts[0])) == (kind, data)
    poller.close()
    wire.close()
    sock.close()


def test_half_a_record_is_no_frame_and_burns_nothing(relay: Relay) -> None:
    """The descriptor has been emptied, so that a poller sleeps until the rest comes."""
    wire, accepted = relay.connect()
    poller = Poller()
    poller.add(accepted)
    held = bytearray()

    def hold_back(data: bytes) -> bytes:
        held.extend(data[20:])
        return data[:20]

    relay.change = hold_back
    wire.send(7, TAG, [b"whole"], soon())
    start = time.thread_time()
    assert poller.wait(soon(0.2)) == []
    assert time.thread_time() - start < 0.05
    assert held
    relay.server.sendall(held)
    assert poller.wait(soon()) == [accepted]
    assert accepted.recv(0.0).kind == 7
    poller.close()
    accepted.close()
    wire.close()
