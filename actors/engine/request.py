"""What the engine is asked for and what it gives back: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum


class FinishReason(StrEnum):
    """Why a request ended. ERROR and UNAVAILABLE carry a message; the others are complete answers."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    ERROR = "error"


class Priority(IntEnum):
    """Which requests come first; the lower number does."""

    INTERACTIVE = 0
    BATCH = 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; every default leaves the model's distribution as it is, but for greedy choice.

    ``temperature == 0`` is greedy (arg max); ``top_k == 0`` means all. ``min_p``: tokens less likely than so much
    of the most likely one are left out. ``repetition_penalty`` divides positive and multiplies negative logits of
    tokens in prompt or answer; ``presence_penalty`` and ``frequency_penalty`` are taken from the logits of tokens
    in the answer, once and once for each time. ``logit_bias``: (id, what is added). ``allowed_ids``: no others may
    come, empty: all may; ``banned_ids`` may not. ``min_tokens``: so many come before a stop id may. ``logprobs``:
    None, or of how many of the likeliest tokens the log-probabilities are wanted beside the drawn one's, 0 to 20.

    ``seed`` and ``choice`` (which of a prompt's several answers this is), both unsigned 64-bit, key the
    counter-based draws together with the token's index, so that a replay draws the same.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    choice: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether the logits of tokens that came before are changed."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class Draw:
    """One token that is to be drawn: number ``index`` of its request's answer.

    ``held_back`` may not come yet (stop ids before ``min_tokens``). ``prompt_ids`` (which of
    them are in the prompt, so once each is enough) and ``generated_ids`` (all ``index`` of them) are what penalties
    look at, and empty where none does. Neither changes later.
    """

    sampling: SamplingParams
    index: int
    held_back: frozenset[int] = frozenset()
    prompt_ids: Sequence[int] = ()
    generated_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural) by the model's own distribution: before temperature, penalties and cuts.

    ``logprob`` and ``rank`` (1 is the likeliest) of the token itself; ``top``: (id, log-probability) of the likeliest,
    in falling order, as many as were asked for.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


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

    ``tenant`` and its ``share`` (weight beside other tenants') are for fairness; cached prompts are shared within a
    tenant and an ``adapter`` only. ``leader``: the request id of a sibling with the same prompt (choice 0 of several
    answers), whose prompt need not be computed twice; one that is not in the engine is ignored. ``prompt_logprobs``:
    None, or 0 to 20: log-probabilities of the prompt's tokens are wanted.
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
    priority: Priority = Priority.INTERACTIVE
    tenant: str = ""
    share: float = 1.0
    adapter: str = ""
    leader: str = ""
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step's news about one request.

    ``index`` counts generated tokens from 0. ``token`` is None when the event only tells the end; ``index`` is then
    that of the token which would have come next. A stop id is reported as a token (so that usage counts it)
    together with ``finish = STOP``. The first token of a run on a shard carries how long the request waited there
    for its first step and how long its prefill took, in seconds; elsewhere these are None. The engine has no clock
    and leaves them to the shard. It also carries how many of the prompt's tokens were found in the prefix cache
    (``cached``; for a choice that has the prompt from another one, what that one found), and ``prompt_logprobs`` where
    they were asked for: one entry per prompt token, None for the first.
    """

    request_id: str
    index: int
    token: int | None
    finish: FinishReason | None = None
    message: str = ""
    queue_s: float | None = None
    prefill_s: float | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached: int = 0
