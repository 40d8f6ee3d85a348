"""Who is let in: the limits, the refusals, and when a refused client may come again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from actors.engine.kv_blocks import BlockPool
from actors.engine.request import GenerationRequest


@dataclass(frozen=True)
class SchedulerLimits:
    """What bounds the engine. ValueError for limits under which requests could not all move forward.

    ``context_length``: prompt and generated tokens of one request. ``max_running``: requests that hold KV
    blocks. ``token_budget``: tokens computed in one step, decode and prefill together; at least
    ``max_running``, so that a step has a token for every running request. ``max_waiting``: requests in the
    queue; above it new ones are refused, replays are not.
    """

    context_length: int
    max_running: int
    token_budget: int
    max_waiting: int

    def __post_init__(self) -> None:
        lowest = {"context_length": 2, "max_running": 1, "token_budget": self.max_running, "max_waiting": 1}
        for name, least in lowest.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")


class AdmissionError(Exception):
    """Root of the refusals. A refused request leaves no trace in the engine."""


class NeverFits(AdmissionError, ValueError):
    """The request cannot be computed even alone; ``field`` names the field of GenerationRequest at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class QueueFull(AdmissionError):
    """The waiting queue is full; ``retry_after_s`` (seconds) estimates when it will have a place."""

    def __init__(self, n_waiting: int, retry_after_s: float) -> None:
        super().__init__(n_waiting, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.args[0]} requests are waiting, retry in {self.retry_after_s:.2f} s"


class DuplicateRequest(AdmissionError):
    """A request of this id is in the engine, or its end has not been handed out yet."""

    def __init__(self, request_id: str) -> None:
        super().__init__(request_id)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"request {self.request_id!r} is in the engine already"


def check_fits(request: GenerationRequest, limits: SchedulerLimits, blocks: BlockPool) -> None:
    """NeverFits unless the request, alone in the engine, could run to its last token."""
    if not request.prompt_ids:
        raise NeverFits("prompt_ids", "is empty, must have at least one token")
    if request.max_tokens <= len(request.generated_ids):
        least = len(request.generated_ids) + 1
        raise NeverFits("max_tokens", f"is {request.max_tokens}, must be at least {least}")
    known = len(request.prompt_ids) + len(request.generated_ids)
    if known + 1 > limits.context_length:
        allowed = limits.context_length - 1
        raise NeverFits("prompt_ids", f"has {known} tokens with those generated, at most {allowed} are allowed")
    # The token generated last is never fed back, so it takes no slot.
    longest = min(len(request.prompt_ids) + request.max_tokens, limits.context_length) - 1
    if (need := blocks.needed(longest)) > blocks.n_blocks:
        field = "prompt_ids" if blocks.needed(known) > blocks.n_blocks else "max_tokens"
        raise NeverFits(field, f"needs {need} KV blocks of {blocks.block_size} tokens, there are {blocks.n_blocks}")


class Pace:
    """How fast the waiting queue moves, from the times (monotonic seconds) of the last starts."""

    _UNKNOWN_S = 1.0
    _LEAST_S, _MOST_S = 0.05, 30.0

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=32)

    def started(self, now: float) -> None:
        """A waiting request began to run."""
        self._starts.append(now)

    def retry_after_s(self, now: float) -> float:
        """Seconds in which about one place comes free; they grow while nothing starts."""
        if not self._starts:
            return self._UNKNOWN_S
        interval = (now - self._starts[0]) / len(self._starts)
        return min(max(interval, self._LEAST_S), self._MOST_S)
