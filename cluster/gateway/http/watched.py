"""The two pages for those who watch the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.gateway.auth import authorise
from cluster.openai.paths import HEALTH, METRICS


class Watched:
    """What /health and /metrics tell. ``ready``: requests can be answered. ``exposition``: the metrics in Prometheus'
    text format; it may block."""

    def __init__(self, ready: Callable[[], bool], exposition: Callable[[], bytes]) -> None:
        self._ready = ready
        self._exposition = exposition
        self._scrape: Future[bytes] | None = None

    @property
    def routes(self) -> list[Route]:
        """/health for everybody, /metrics for admins."""
        return [Route(HEALTH, self._health), Route(METRICS, self._metrics)]

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if self._ready() else JSONResponse({"status": "unavailable"}, 503)

    async def _metrics(self, request: Request) -> Response:
        authorise(request.state.caller)
        return Response(await self._scraped(), media_type=CONTENT_TYPE_LATEST)

    async def _scraped(self) -> bytes:
        """What the scrape that is under way gives, for everybody who waits; if there is none, one begins."""
        if self._scrape is None or self._scrape.done():
            self._scrape = _in_thread(self._exposition)
        return await asyncio.wrap_future(self._scrape)


def _in_thread(work: Callable[[], bytes]) -> Future[bytes]:
    """Not in the loop's executor, which prepares requests: a scrape may wait for the controller."""
    done: Future[bytes] = Future()
    done.set_running_or_notify_cancel()  # one who waits no more does not take it from the others

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    Thread(target=run, name="scrape", daemon=True).start()
    return done
