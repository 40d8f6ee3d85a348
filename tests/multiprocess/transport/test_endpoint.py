"""Endpoints: which medium, what they refuse to believe, and leaving nothing behind."""

from __future__ import annotations

import mmap
import os
import queue
import socket
import struct
import threading
from collections import deque

import pytest

from actors.transport import shm
from actors.transport.base import (
    MAX_FRAME_BYTES,
    EndpointLike,
    HandshakeRefused,
    Medium,
    PeerGone,
    ProtocolError,
    Wire,
)
from actors.transport.endpoint import Endpoint
from actors.transport.frame import HEADER_BYTES, encode_header, filling
from actors.transport.handshake import greet
from actors.transport.local import LocalNetwork
from tests.multiprocess.transport.remote import NODE, SECRET, soon
from tests.multiprocess.transport.servers import TAG, Server, ended


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


def test_a_frame_that_breaks_a_limit_ends_the_wire(server: Server) -> None:
    for garbage, text in (
        (bytes(HEADER_BYTES), "magic"),
        (encode_header(1, TAG, [1] * 8)[:-4] + struct.pack("<I", MAX_FRAME_BYTES), "announces 268435463 bytes"),
    ):
        sock = server.dial(Medium.TCP)
        sock.setblocking(False)
        greet(sock, Medium.TCP, "client", "server", SECRET, soon())
        wire = server.wires.get(timeout=10)
        sock.sendall(encode_header(7, TAG, [3]) + b"abc" + filling(3) + garbage)
        assert wire.recv(soon()).kind == 7
        with pytest.raises(ProtocolError, match=f"'client' over tcp: .*{text}"):
            wire.recv(soon())
        with pytest.raises(PeerGone):
            wire.recv(soon())
        sock.setblocking(True)
        assert ended(sock) == b""
        sock.close()


def test_what_is_garbled_behind_a_frame_needs_no_further_bell(server: Server) -> None:
    wire = server.client.connect(server.address, soon(), Medium.SHM)
    accepted = server.wires.get(timeout=10)
    wire.send(7, TAG, [b"abc"], soon())
    wire._push(deque([memoryview(bytes(HEADER_BYTES))]))  # type: ignore[attr-defined]
    assert accepted.ready()
    assert accepted.recv(soon()).kind == 7
    assert accepted.buffered()
    with pytest.raises(ProtocolError, match="from 'client' over shm: frame magic"):
        accepted.recv(soon())
    wire.close()


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
