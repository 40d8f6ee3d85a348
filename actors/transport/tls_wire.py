"""The wire between nodes under TLS: the TCP wire with records in place of vectored writes."""

from __future__ import annotations

import ssl
from collections import deque

from actors.transport.base import Medium, PeerGone, ProtocolError
from actors.transport.sockets import NOT_YET, tls_reason
from actors.transport.tcp import TcpWire, take_off
from actors.transport.tls import MAX_RECORD_BYTES


class TlsWire(TcpWire):
    """Takes over a connected, non-blocking socket after its TLS handshake and hello.

    A TLS socket has no ``sendmsg``: the front of a frame, header and small parts, is gathered into one record; what is
    larger than a record is encrypted where it lies. Either way one write is one record.

    A read takes one record, and its target always has room for a whole one (``tcp.READ_BYTES``). So nothing that is
    decrypted already stays behind in the TLS library, where it would show on no descriptor.
    """

    def __init__(self, peer: str, sock: ssl.SSLSocket, spin_us: float) -> None:
        super().__init__(peer, sock, spin_us, Medium.TLS)
        self._tls = sock
        self._record = memoryview(bytearray(MAX_RECORD_BYTES))

    def _push(self, outgoing: deque[memoryview]) -> bool:
        # A record for which there was no room is kept encrypted and must be offered again as it was: it is, because
        # the same ``outgoing`` gives the same record.
        try:
            count = self._tls.send(self._next_record(outgoing))
        except NOT_YET:
            return False
        except OSError as error:
            self._end_by("sending to", error)
            return False
        take_off(outgoing, count)
        return True

    def _next_record(self, outgoing: deque[memoryview]) -> memoryview:
        if len(outgoing) == 1 or len(outgoing[0]) >= MAX_RECORD_BYTES:
            return outgoing[0][:MAX_RECORD_BYTES]
        size = 0
        for view in outgoing:
            piece = view[: MAX_RECORD_BYTES - size]
            self._record[size : size + len(piece)] = piece
            size += len(piece)
        return self._record[:size]

    def _read(self, target: memoryview) -> int:
        try:
            count = self._tls.recv_into(target)
        except NOT_YET:
            return 0
        except OSError as error:
            self._end_by("receiving from", error)
            return 0
        if count == 0:
            self._end_by_peer()
        return count

    def _end_by(self, what: str, error: OSError) -> None:
        text = f"{what} {self.peer!r} over {self.medium}"
        if isinstance(error, ssl.SSLEOFError):
            self._end_by_peer()
        elif isinstance(error, ssl.SSLError):
            self._set_end(ProtocolError, f"{text}: {tls_reason(error)}")
        else:
            self._set_end(PeerGone, f"{text}: {error}")
