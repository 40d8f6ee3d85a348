"""Reading a request's body: JSON, not too large, not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import Receive

_JSON = "application/json"


class ClientGone(Exception):
    """Nobody is there any more who would read an answer."""


async def read_json_body(headers: Mapping[str, str], receive: Receive, max_bytes: int, timeout_s: float) -> bytes:
    """The bytes of a body that says it is JSON.

    Raises HTTPException (408, 413, 415), and ClientGone.
    """
    _check_type(headers)
    if int(headers.get("content-length", "0")) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(receive, max_bytes)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {timeout_s:g} s") from None


async def _read(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body"):
            return bytes(body)


def _check_type(headers: Mapping[str, str]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _JSON:
        raise HTTPException(415, f"content-type is {kind[:100]!a}; allowed is {_JSON}")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise HTTPException(415, f"content-encoding is {encoding[:100]!a}; allowed is none")


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"the body is too large; allowed are {max_bytes} bytes")
