"""The paths there are at the HTTP door, for whoever has to know them."""

from __future__ import annotations

from enum import StrEnum


class Endpoint(StrEnum):
    """What generates, by the path of its URL."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


MODELS = "/v1/models"
HEALTH = "/health"
METRICS = "/metrics"

PATHS = (*Endpoint, MODELS, HEALTH, METRICS)
"""All but those below MODELS, one for each model."""
