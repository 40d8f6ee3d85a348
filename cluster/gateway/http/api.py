"""What there is at which path: the API, and the few pages for those who watch the gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cluster.access import AccessList
from cluster.gateway.auth import authorise
from cluster.gateway.errors import UnknownModel
from cluster.gateway.http.edge import HEALTH, Edge, http_exception
from cluster.gateway.http.generation import BODY_TIMEOUT_S, Generation
from cluster.gateway.inference import Inference
from cluster.gateway.served_model import ServedModel
from cluster.openai.requests import Endpoint
from cluster.openai.responses import Json

_OWNER = "expertmesh"
_BODY_BYTES = 2**20
_BODY_BYTES_PER_CONTEXT_TOKEN = 64
"""More than a token's worth of text or digits takes in JSON. Reading JSON holds the interpreter's lock, so for 64 MiB
of numbers every stream would stand still for seconds."""


@dataclass(frozen=True)
class Watched:
    """What /health and /metrics tell. ``ready``: requests can be answered. ``exposition``: the metrics in Prometheus'
    text format; it may block."""

    ready: Callable[[], bool]
    exposition: Callable[[], bytes]

    @property
    def routes(self) -> list[Route]:
        """/health for everybody, /metrics for admins."""
        return [Route(HEALTH, self._health), Route("/metrics", self._metrics)]

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if self.ready() else JSONResponse({"status": "unavailable"}, 503)

    async def _metrics(self, request: Request) -> Response:
        authorise(request.state.caller)
        return Response(await asyncio.to_thread(self.exposition), media_type=CONTENT_TYPE_LATEST)


class _Models:
    """The one model there is, in OpenAI's list."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._created = int(time.time())

    async def every(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model.name:
            raise UnknownModel(name, self._model.name)
        return JSONResponse(self._entry())

    def _entry(self) -> Json:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": _OWNER,
            "max_model_len": self._model.context_length,  # as vLLM tells it
        }


def api(
    inference: Inference,
    access: AccessList,
    watched: Watched,
    max_message: int,
    closing: asyncio.Event,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> ASGIApp:
    """OpenAI's API. ``max_message``: bytes of a body, at most; fewer where the model's context can hold less.
    ``closing`` is set when the door closes."""
    models = _Models(inference.model)
    max_body = min(max_message, _BODY_BYTES + _BODY_BYTES_PER_CONTEXT_TOKEN * inference.model.context_length)
    generations = [
        Route(end, Generation(end, inference, max_body, closing, body_timeout_s), methods=["POST"]) for end in Endpoint
    ]
    lists = [Route("/v1/models", models.every), Route("/v1/models/{name:path}", models.one)]
    return _app([*generations, *lists, *watched.routes], access)


def metrics_api(watched: Watched) -> ASGIApp:
    """Health and metrics alone, for everybody who can reach it."""
    return _app(watched.routes, AccessList())


def _app(routes: list[Route], access: AccessList) -> ASGIApp:
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Edge, access=access)],
        exception_handlers={HTTPException: http_exception},
    )
    app.router.redirect_slashes = False
    return app
