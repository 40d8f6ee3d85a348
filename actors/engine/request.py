"""What the engine is asked for and what it gives back. Plain data, no behaviour beyond validation-free helpers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request ended. ERROR and UNAVAILABLE carry a message; the others are complete answers."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. ``temperature == 0`` is greedy (arg max); ``top_k == 0`` means all.

    ``seed`` keys the counter-based draws together with the choice index and the token's position, so that a replay
    draws the same.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One admitted request, as the gateway hands it to an attention shard.

    ``timeout_s`` is what is left of the client's deadline in seconds (clocks of two nodes do not compare), or None.
    ``gateway`` names the endpoint to which the tokens go.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    timeout_s: float | None = None
    gateway: str = ""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step's news about one request.

    ``index`` counts generated tokens from 0. ``token`` is None when the event only tells the end. A stop id is
    reported as a token (so that usage counts it) together with ``finish = STOP``.
    """

    request_id: str
    index: int
    token: int | None
    finish: FinishReason | None = None
    message: str = ""
