"""What the engine is asked for and what it gives back: plain data."""

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

    ``seed`` and ``choice`` (which of a prompt's several answers this is), both unsigned 64-bit, key the
    counter-based draws together with the token's index, so that a replay draws the same.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    choice: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One admitted request, as the gateway hands it to an attention shard.

    ``timeout_s`` is what is left of the client's deadline in seconds (clocks of two nodes do not compare), or
    None. ``gateway`` names the endpoint to which the tokens go. ``generated_ids`` are the tokens this request
    generated before, on a shard that was lost: they are computed like the prompt, count towards
    ``max_tokens``, and are not published again, so that the first new token has index ``len(generated_ids)``
    and is drawn as it would have been. ``replay`` marks a request that was admitted before, on such a shard: a full
    queue does not refuse it. ``traceparent`` is the W3C trace context of the span that waits for it, or empty; the
    engine carries it along.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    timeout_s: float | None = None
    gateway: str = ""
    generated_ids: tuple[int, ...] = ()
    replay: bool = False
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step's news about one request.

    ``index`` counts generated tokens from 0. ``token`` is None when the event only tells the end; ``index``
    is then that of the token which would have come next. A stop id is reported as a token (so that usage
    counts it) together with ``finish = STOP``. The first token of a run on a shard carries how long the request
    waited there for its first step and how long its prefill took, in seconds; elsewhere these are None. The engine has
    no clock and leaves them to the shard.
    """

    request_id: str
    index: int
    token: int | None
    finish: FinishReason | None = None
    message: str = ""
    queue_s: float | None = None
    prefill_s: float | None = None
