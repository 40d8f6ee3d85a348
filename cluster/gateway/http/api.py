"""What there is at which path."""

from __future__ import annotations

import asyncio
import re

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp

from cluster.access import AccessList
from cluster.gateway.http.edge import Edge, http_exception
from cluster.gateway.http.generation import BODY_TIMEOUT_S, Generation
from cluster.gateway.http.models import Models
from cluster.gateway.http.watched import Watched
from cluster.gateway.inference import Inference
from cluster.openai.paths import Endpoint

_BODY_BYTES = 2**20
_BODY_BYTES_PER_CONTEXT_TOKEN = 64
"""More than a token's worth of text or digits takes in JSON. Reading JSON holds the interpreter's lock, so for 64 MiB
of numbers every stream would stand still for seconds."""


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
    max_body = min(max_message, _BODY_BYTES + _BODY_BYTES_PER_CONTEXT_TOKEN * inference.model.context_length)
    generations = [
        Route(end, Generation(end, inference, max_body, closing, body_timeout_s), methods=["POST"]) for end in Endpoint
    ]
    return _app([*generations, *Models(inference.model).routes, *watched.routes], access)


def metrics_api(watched: Watched) -> ASGIApp:
    """Health and metrics alone, for everybody who can reach it."""
    return _app(watched.routes, AccessList())


def _app(routes: list[Route], access: AccessList) -> ASGIApp:
    for route in routes:  # starlette's patterns end in $, which also matches before a line break at the end
        route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"\Z")
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Edge, access=access)],
        exception_handlers={HTTPException: http_exception},
    )
    app.router.redirect_slashes = False
    return app
