"""uvicorn's HTTP/1.1 for clients that nobody knows: a head has to come, an answer to be taken, and in the end to go."""

from __future__ import annotations

import asyncio
import json
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cluster.openai.errors import HttpError

HEAD_TIMEOUT_S = 30.0
STALL_TIMEOUT_S = 60.0
"""A client that takes nothing of what waits for it for so long is cut off. (One whose machine is gone: listener.py.)"""
EARLY_BYTES = 2**16
"""Of requests that come before the answer to the one before them."""
MAX_CONNECTIONS = 4096
"""To one door; fewer where the process may not open four times as many files."""

_MALFORMED = HttpError(400, "the request is not HTTP/1.1 as RFC 9112 has it", "invalid_request_error", "invalid_http")
_FULL = HttpError(503, "too many connections", "server_error", "too_many_connections", retry_after_s=1.0)


class HttpProtocol(H11Protocol):
    """uvicorn closes a connection that waits for its next request in silence; here also one that has none yet, that
    sends its head drop by drop (the body's time is up to the application), or that does not take its answer."""

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    # -- what asyncio and uvicorn call ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _most_connections():
            self.logger.warning("HTTP door: %s", _FULL.message)
            self._end_with(_FULL)
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._answering:
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_stall_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """uvicorn stops reading when a request comes early: then it would not see that its client leaves."""
        super().handle_events()
        if self.flow.read_paused and self._answering and not self.cycle.more_body:
            if len(self.conn.trailing_data[0]) > EARLY_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP. The application is told, if there is one at work, that its client has gone."""
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._end_with(_MALFORMED)
        else:  # amid an answer
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_reader()

    # -- its own ----------------------------------------------------------------------------------------------------

    @property
    def _answering(self) -> bool:
        """True from a request's head to the end of its answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _end_with(self, error: HttpError) -> None:
        """Tell an error to a client whose request the application does not see, and close."""
        body = json.dumps(error.body).encode()
        headers = {**error.headers, "content-type": "application/json", "connection": "close"}
        told = h11.Response(status_code=error.status, headers=[*headers.items(), ("content-length", str(len(body)))])
        for event in (told, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
        self._await_reader()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_reader(self) -> None:
        """Look after a while whether the client has taken something. Called when writing has to pause, and when an
        answer is complete: in between nothing is written, so that what waits only gets less."""
        self._stop_stall_timer()
        unsent = self.transport.get_write_buffer_size()
        if unsent or self.transport.is_closing():
            self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self._look_at_reader, unsent)

    def _look_at_reader(self, before: int) -> None:
        self._stall_timer = None
        unsent, closing = self.transport.get_write_buffer_size(), self.transport.is_closing()
        if self._answering and not self.flow.write_paused and not closing:
            return  # all was taken, and the next answer is on its way
        if 0 < unsent < before:
            self._await_reader()
        elif unsent or closing:  # TLS has bytes that do not show
            self.transport.abort()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _most_connections() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 4)
