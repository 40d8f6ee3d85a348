"""Servers for the tests of endpoints: an honest one with its clients, and impostors."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

from actors.transport.base import Address, FrameTag, Medium, TransportError, Wire
from actors.transport.endpoint import Endpoint
from actors.transport.tls import WireTls
from tests.multiprocess.transport.remote import NODE, SECRET, soon

TAG = FrameTag()


class Server:
    """An endpoint called "server", the wires it got, and clients of it."""

    def __init__(self, tls: WireTls | None = None) -> None:
        self.wires: queue.Queue[Wire] = queue.Queue()
        self.endpoint = Endpoint("server", NODE, SECRET, on_wire=self.wires.put, tls=tls)
        self.client = Endpoint("client", NODE, SECRET, tls=tls)

    @property
    def address(self) -> Address:
        return self.endpoint.address

    def dial(self, medium: Medium) -> socket.socket:
        """A bare connection to one of its listeners."""
        if medium is not Medium.SHM:
            return socket.create_connection((self.address.host, self.address.port), 10)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(10)
        sock.connect("\0" + self.address.unix_name)
        return sock

    def pair(self, medium: Medium) -> tuple[Wire, Wire]:
        """A client's wire and the server's end of it."""
        return self.client.connect(self.address, soon(), medium), self.wires.get(timeout=10)

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
