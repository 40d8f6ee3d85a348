"""How long requests over HTTP take, whatever becomes of them: around a whole application, so that none is left out."""

from __future__ import annotations

import time
from collections.abc import Callable

from opentelemetry.metrics import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.openai.paths import MODELS, PATHS

OTHER = "_OTHER"

_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")


class HttpMeter:
    """An ASGI application around another one. ``clock`` in seconds."""

    def __init__(self, app: ASGIApp, histogram: Histogram, clock: Callable[[], float] = time.perf_counter) -> None:
        self._app = app
        self._histogram = histogram
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; when the answer has ended, or its client has gone, note how long it took."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        labels: dict[str, str | int] = {
            "http.request.method": scope["method"] if scope["method"] in _METHODS else OTHER,
            "http.route": _route(scope["path"]),
        }

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                labels["http.response.status_code"] = int(message["status"])  # an HTTPStatus is another label value
            await send(message)

        began = self._clock()
        try:
            await self._app(scope, receive, noting)
        finally:
            self._histogram.record(self._clock() - began, labels)


def _route(path: str) -> str:
    """Not the path itself, which a client chooses."""
    if path in PATHS:
        return str(path)
    return f"{MODELS}/{{name}}" if path.startswith(f"{MODELS}/") else OTHER
