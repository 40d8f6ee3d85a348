"""OpenAI's list of models."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.gateway.errors import UnknownModel
from cluster.gateway.served_model import ServedModel
from cluster.openai.paths import MODELS
from cluster.openai.responses import Json

_OWNER = "expertmesh"


class Models:
    """The one model there is, as a list and by its name."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._created = int(time.time())

    @property
    def routes(self) -> list[Route]:
        """The list, and each entry."""
        return [Route(MODELS, self._every), Route(f"{MODELS}/{{name:path}}", self._one)]

    async def _every(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def _one(self, request: Request) -> Response:
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
