"""Who gets a wire and who does not: connecting, refusing, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from actors.transport import shm
from actors.transport.base import (
    MAX_FRAME_BYTES,
    Address,
    EndpointLike,
    FrameTag,
    HandshakeRefused,
    Medium,
    PeerGone,
    ProtocolError,
    TransportError,
    Wire,
    WireTimeout,
)
from actors.transport.endpoint import MAX_HANDSHAKES, Endpoint
from actors.transport.frame import PROTOCOL_VERSION, encode_header
from actors.transport.handshake import answer, greet
from actors.transport.local import LocalNetwork
from tests.multiprocess.transport.remote import NODE, SECRET, soon

TAG = FrameTag()


class Server:
    """An endpoint called "server", the wires it got, and clients of it."""

    def __init__(self) -> None:
        self.wires: queue.Queue[Wire] = queue.Queue()
        self.endpoint = Endpoint("server", NODE, SECRET, on_wire=self.wires.put)
        self.client = Endpoint("client", NODE, SECRET)

    @property
    def address(self) -> Address:
        return self.endpoint.address

    def dial(self, medium: Medium) -> socket.socket:
        """A bare connection to one of its listeners."""
        if medium is Medium.TCP:
            return socket.create_connection((self.address.host, self.address.port), 10)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(10)
        sock.connect("\0" + self.address.unix_name)
        return sock

    def check(self, medium: Medium | None = None) -> None:
        """An honest client gets a working wire, and soon."""
        start = time.monotonic()
        wire = self.client.connect(self.address, soon(), medium)
        accepted = self.wires.get(timeout=10)
        assert time.monotonic() - start < 1.5
        assert (wire.peer, accepted.peer) == ("server", "client")
        assert wire.medium is accepted.medium
        wire.send(1, TAG, [b"hello"], soon())
        assert bytes(accepted.recv(soon()).parts[0]) == b"hello"
        wire.close()
        accepted.close()

    def close(self) -> None:
        self.client.close()
        self.endpoint.close()
        assert self.wires.empty(), "somebody got a wire who should not have"


@pytest.fixture
def server() -> Iterator[Server]:
    before = len(os.listdir("/proc/self/fd"))
    server = Server()
    yield server
    server.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == 1


def ended(sock: socket.socket) -> bytes:
    """What came before the other side closed the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(4096):
            data += piece
    return data


@contextlib.contextmanager
def impostor(serve: Callable[[socket.socket], None]) -> Iterator[Address]:
    """A TCP server that treats one connection as ``serve`` does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(TransportError):
                serve(sock)

        thread = threading.Thread(target=run)
        thread.start()
        yield Address("server", "elsewhere", "127.0.0.1", listener.getsockname()[1])
        thread.join(10)


def test_the_medium_follows_the_node(server: Server) -> None:
    server.check(Medium.SHM)
    server.check(Medium.TCP)
    wire = server.client.connect(server.address, soon())
    assert wire.medium is Medium.SHM
    elsewhere = Endpoint("client", "node-1", SECRET)
    far = elsewhere.connect(server.address, soon())
    assert far.medium is Medium.TCP
    with pytest.raises(HandshakeRefused, match=r"shm to 'server' on node 'node-0'.*'node-1' are: tcp"):
        elsewhere.connect(server.address, soon(), Medium.SHM)
    for end in (wire, far, server.wires.get(timeout=10), server.wires.get(timeout=10)):
        end.close()
    elsewhere.close()


def test_an_endpoint_may_offer_one_medium_only() -> None:
    got: queue.Queue[Wire] = queue.Queue()
    listener = Endpoint("server", NODE, SECRET, on_wire=got.put, media=frozenset({Medium.TCP}))
    assert listener.address.unix_name == ""
    client = Endpoint("client", NODE, SECRET)
    wire = client.connect(listener.address, soon())
    assert wire.medium is Medium.TCP
    with pytest.raises(HandshakeRefused, match="any medium"):
        listener.connect(client.address, soon())
    wire.close()
    got.get(timeout=10).close()
    client.close()
    listener.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": ""}, "endpoint name ''"),
        ({"name": "x" * 256}, "256 bytes"),
        ({"secret": b"short"}, "secret has 5 bytes"),
        ({"host": "0.0.0.0"}, "host is '0.0.0.0'"),
        ({"ring_bytes": 5000}, "ring_bytes is 5000"),
        ({"media": frozenset({Medium.LOCAL})}, "media is local"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], text: str) -> None:
    arguments = {"name": "x", "node_id": NODE, "secret": SECRET, **change}
    with pytest.raises(ValueError, match=text):
        Endpoint(**arguments)  # type: ignore[arg-type]


def test_fifty_connects_leave_no_descriptor_thread_or_shared_memory(server: Server) -> None:
    server.check()

    def census() -> tuple[int, int, list[str]]:
        return len(os.listdir("/proc/self/fd")), threading.active_count(), os.listdir("/dev/shm")

    before = census()
    for index in range(50):
        server.check((Medium.SHM, Medium.TCP)[index % 2])
    assert census() == before


def test_closing_an_endpoint_leaves_its_wires_and_ends_its_listening(server: Server) -> None:
    wires = [server.client.connect(server.address, soon(), medium) for medium in (Medium.SHM, Medium.TCP)]
    accepted = [server.wires.get(timeout=10) for _ in wires]
    server.endpoint.close()
    server.endpoint.close()
    for wire in wires:
        wire.send(1, TAG, [b"still"], soon())
    for wire in accepted:
        assert bytes(wire.recv(soon()).parts[0]) == b"still"
    for medium in (Medium.SHM, Medium.TCP):
        with pytest.raises(PeerGone, match="server"):
            server.client.connect(server.address, soon(), medium)
    for wire in (*wires, *accepted):
        wire.close()


@pytest.mark.parametrize("medium", [Medium.SHM, Medium.TCP])
@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", os.urandom(9)])
def test_a_stranger_is_shown_out_at_once(server: Server, medium: Medium, words: bytes) -> None:
    start = time.monotonic()
    with server.dial(medium) as sock:
        sock.sendall(words)
        assert ended(sock) == b""
    assert time.monotonic() - start < 1.5
    server.check(medium)


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
    assert 1.5 < time.monotonic() - start < 4.0


def test_a_flood_of_silence_does_not_lock_honest_clients_out(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.dial(Medium.TCP))
        for _ in range(MAX_HANDSHAKES + 20):
            stack.enter_context(server.dial(Medium.TCP))
        start = time.monotonic()
        assert ended(first) == b""
        assert time.monotonic() - start < 1.5, "the oldest goes first, before its two seconds"
        server.check(Medium.TCP)
        assert threading.active_count() <= MAX_HANDSHAKES + 2
        server.endpoint.close()
    assert threading.active_count() == 1


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


def test_a_frame_that_breaks_a_limit_ends_the_wire(server: Server) -> None:
    for garbage, text in (
        (b"\0" * 68, "magic"),
        (encode_header(1, TAG, [1] * 8)[:-4] + struct.pack("<I", MAX_FRAME_BYTES), "announces 268435463 bytes"),
    ):
        sock = server.dial(Medium.TCP)
        sock.setblocking(False)
        greet(sock, Medium.TCP, "client", "server", SECRET, soon())
        wire = server.wires.get(timeout=10)
        sock.sendall(encode_header(7, TAG, [3]) + b"abc" + garbage)
        assert wire.recv(soon()).kind == 7
        with pytest.raises(ProtocolError, match=f"'client' over tcp: .*{text}"):
            wire.recv(soon())
        with pytest.raises(PeerGone):
            wire.recv(soon())
        sock.setblocking(True)
        assert ended(sock) == b""
        sock.close()


def test_a_doorbell_that_lies_ends_the_wire(server: Server) -> None:
    wire = server.client.connect(server.address, soon(), Medium.SHM)
    accepted = server.wires.get(timeout=10)
    os.eventfd_write(wire._out.data_bell, (4 << 20) + 1)  # type: ignore[attr-defined]
    with pytest.raises(ProtocolError, match="'client' announced 4194305 bytes of a ring of 4194304"):
        accepted.recv(soon())
    with pytest.raises(PeerGone):
        wire.recv(soon())
    wire.close()


@pytest.mark.parametrize("fault", ["unsealed", "too small", "too few", "odd size", "nothing"])
def test_bad_shared_memory_is_refused(server: Server, fault: str) -> None:
    ring = 64 << 10
    memory = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, ring if fault == "too small" else 2 * ring)
    if fault != "unsealed":
        shm.fcntl.fcntl(memory, shm.fcntl.F_ADD_SEALS, shm.fcntl.F_SEAL_SHRINK)
    bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3 if fault == "too few" else 4)]
    with server.dial(Medium.SHM) as sock:
        sock.setblocking(False)
        greet(sock, Medium.SHM, "client", "server", SECRET, soon())
        if fault != "nothing":
            size = ring + mmap.PAGESIZE // 2 if fault == "odd size" else ring
            socket.send_fds(sock, [struct.pack("<Q", size)], [memory, *bells])
        sock.setblocking(True)
        sock.settimeout(10)
        assert ended(sock) == b""
    for fd in (memory, *bells):
        os.close(fd)


def test_a_local_network_behaves_like_an_endpoint() -> None:
    network = LocalNetwork()
    got: queue.Queue[Wire] = queue.Queue()
    first: EndpointLike = network.endpoint("first", got.put)
    second: EndpointLike = network.endpoint("second")
    wire = second.connect(first.address, soon())
    accepted = got.get_nowait()
    assert (wire.peer, accepted.peer, wire.medium) == ("first", "second", Medium.LOCAL)
    with pytest.raises(ValueError, match="'first' is taken"):
        network.endpoint("first")
    with pytest.raises(HandshakeRefused, match="tcp"):
        second.connect(first.address, soon(), Medium.TCP)
    with pytest.raises(HandshakeRefused, match="'second' accepts no wires"):
        first.connect(second.address, soon())
    first.close()
    first.close()
    with pytest.raises(PeerGone, match="'first'"):
        second.connect(first.address, soon())
    wire.close()
    accepted.close()
    network.endpoint("first").close()
