"""The two endpoints that generate: an OpenAI body in, one JSON object or server-sent events out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.gateway.call import TRACE_HEADERS, Call, operation_of
from cluster.gateway.errors import DRAINING, Unavailable
from cluster.gateway.http.body import ClientGone, read_json_body
from cluster.gateway.http.edge import error_response
from cluster.gateway.inference import Inference
from cluster.gateway.off_loop import INLINE_ENTRIES
from cluster.gateway.spelling import spelled
from cluster.openai.errors import http_error
from cluster.openai.paths import Endpoint
from cluster.openai.requests import Parsed, parse_json, parse_request
from cluster.openai.responses import Answer, Json

BODY_TIMEOUT_S = 30.0
_DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Generation:
    """ASGI application of one endpoint. ``closing`` is set when the door closes: what still runs then is ended."""

    def __init__(
        self,
        endpoint: Endpoint,
        inference: Inference,
        max_body: int,
        closing: asyncio.Event,
        body_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self._endpoint = endpoint
        self._inference = inference
        self._max_body = max_body
        self._closing = closing
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, state = Headers(scope=scope), scope["state"]
        try:
            data = await read_json_body(headers, receive, self._max_body, self._body_timeout_s)
        except ClientGone:
            return
        # a long body takes time: not in the loop that serves every stream
        parsed = await asyncio.to_thread(_parse, self._endpoint, data)
        parsed.message.request_id = state["request_id"]
        trace = {name: headers[name] for name in TRACE_HEADERS if name in headers}
        call = Call(
            "http",
            operation_of(parsed.message),
            state["caller"],
            trace=trace,
            default_max_tokens=parsed.default_max_tokens,
            client_id=state["client_id"],
        )
        answer, events = Answer(parsed, int(time.time()), self._spell), EventStream(send)
        try:
            await self._while_wanted(self._generate(parsed, call, answer, events), receive)
            if answer.finished and not parsed.stream:
                # out here the door's close does not come between the response's head and its body
                await (await _whole(answer))(scope, receive, send)
        except Exception as error:
            told = http_error(error, parsed)
            if events.begun:
                await events.send([told.body])
                await events.end()
            else:
                await error_response(told)(scope, receive, send)

    def _spell(self, token_id: int) -> tuple[str, bytes]:
        return spelled(self._inference.model.tokenizer, token_id)

    async def _generate(self, parsed: Parsed, call: Call, answer: Answer, events: EventStream) -> None:
        """Take the answer in, and tell a stream. Before the first message nothing is sent: until then an error has its
        own status."""
        async with aclosing(self._inference.generate(parsed.message, call)) as messages:
            async for message in messages:
                chunks = answer.push(message)
                if parsed.stream:
                    await events.send(chunks)
        if parsed.stream:
            await events.end(_DONE)

    async def _while_wanted(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Do ``work`` unless the client goes away: then it is cancelled, which frees the request. Raises Unavailable
        when the door closes meanwhile."""
        working = asyncio.create_task(work)
        gone, closing = asyncio.create_task(_gone(receive)), asyncio.create_task(self._closing.wait())
        tasks = (working, gone, closing)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if working in done:
            working.result()
        elif gone not in done:
            raise Unavailable(DRAINING)


class EventStream:
    """Server-sent events, begun with the first ``send``. Each waits while the client's side is full."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def send(self, objects: Sequence[Json]) -> None:
        """One event for each of ``objects``, in one piece; none only begins the stream."""
        if not self.begun:
            await self._send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": _STREAM_HEADERS})
            self.begun = True
        await self._put(b"".join(_event(one) for one in objects), more=True)

    async def end(self, last: bytes = b"") -> None:
        """``last`` as it is, and no more."""
        await self._put(last, more=False)

    async def _put(self, data: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _event(one: Json) -> bytes:
    return b"data: " + json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _whole(answer: Answer) -> Response:
    """One with many log-probabilities is spelled, serialised and sent piece by piece, while other streams go on."""
    if answer.entries <= INLINE_ENTRIES:
        return JSONResponse(answer.body())
    pieces = await asyncio.to_thread(lambda: list(answer.pieces()))
    headers = {"content-length": str(sum(map(len, pieces)))}
    return StreamingResponse(_each(pieces), media_type=JSONResponse.media_type, headers=headers)


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _parse(endpoint: Endpoint, data: bytes) -> Parsed:
    return parse_request(endpoint, parse_json(data))


async def _gone(receive: Receive) -> None:
    """Return when the client is not there any more."""
    while (await receive())["type"] != "http.disconnect":
        pass
