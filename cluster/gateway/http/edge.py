"""Around every request: who calls, the request's id, and what an error looks like."""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import suppress
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.access import AccessList
from cluster.gateway.auth import authenticate
from cluster.gateway.errors import InvalidRequest
from cluster.openai.errors import HttpError, http_error
from cluster.openai.paths import HEALTH

LINGER_S = 1.0
_REQUEST_ID = "x-request-id"
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}
_OF_ROUTING = (404, 405)
_SAFE_ID = re.compile(r"[!-~]{1,128}")


class Edge:
    """ASGI middleware. Inside, ``scope["state"]`` has ``caller``, ``request_id`` and ``client_id``. HEALTH, which tells
    nothing of the model, is the only path that needs no token: there is no caller.

    The id is ours. The client's is given back and logged: proxies use theirs again, so it cannot name a request as
    gRPC's does.
    """

    def __init__(self, app: ASGIApp, access: AccessList) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        request_id = scope["state"]["request_id"] = uuid.uuid4().hex
        sent_id = headers.get(_REQUEST_ID, "")
        client_id = scope["state"]["client_id"] = sent_id if _SAFE_ID.fullmatch(sent_id) else ""
        exchange = _Exchange(headers, client_id or request_id, receive, send)
        try:
            _check_framing(headers)
            if scope["path"] != HEALTH:
                scope["state"]["caller"] = authenticate(self._access, headers.getlist("authorization"))
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.started:
                raise
            await error_response(http_error(error))(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its response as they pass.

    A response to a request whose body was not read ends the connection, else the rest of it would be read for as long
    as the client likes to send it. A little while it is: closing at once would reset the connection, and a client that
    still sends may never see the response (RFC 9112, 9.6). A 503 ends it too: the next one may find another gateway.
    """

    def __init__(self, headers: Headers, told_id: str, receive: Receive, send: Send) -> None:
        self._told_id = told_id
        self._unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self._receive, self._send = receive, send
        self.started = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._unread = self._unread and bool(message.get("more_body"))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers[_REQUEST_ID] = self._told_id
            if self._unread or message["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
                headers["connection"] = "close"
        elif self._unread and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._discard()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _discard(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self._unread:
                    await self.receive()


def _check_framing(headers: Headers) -> None:
    """A body with two ends, one for us and another for a proxy, smuggles a request past it (RFC 9112, 6.3)."""
    if "content-length" in headers and "transfer-encoding" in headers:
        raise InvalidRequest("transfer-encoding", "is given beside content-length; allowed is one of them")


def error_response(error: HttpError) -> Response:
    """``error`` as a whole response."""
    return JSONResponse(error.body, error.status, error.headers)


async def http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors (404, 405), and those of reading a body."""
    assert isinstance(error, HTTPException)
    status, message = error.status_code, error.detail
    if status in _OF_ROUTING:
        message = f"there is no {request.method} {request.url.path[:100]!a} here"
    told = HttpError(status, message, "invalid_request_error", _CODES[status], extra_headers=dict(error.headers or {}))
    return error_response(told)
