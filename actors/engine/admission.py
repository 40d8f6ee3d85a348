"""Who is let in: the limits, the refusals, and when a refused client may come again."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from actors.engine.fairness import LEAST_SHARE
from actors.engine.kv_blocks import BlockPool
from actors.engine.request import GenerationRequest


@dataclass(frozen=True)
class SchedulerLimits:
    """What bounds the engine. ValueError for limits under which requests could not all move forward.

    ``context_length``: prompt and generated tokens of one request. ``max_running``: requests that hold KV
    blocks. ``token_budget``: tokens computed in one step, decode and prefill together; at least
    ``max_running``, so that a step has a token for every running request. ``max_waiting``: requests of one
    priority in the queue; see :func:`check_queue`. ``prefix_cache``: whether KV blocks are found again by their
    tokens. ``max_gap``: how many times the usual time of a step a prefill may make interactive streams wait for
    their next token, above 1, or 0 for no bound. ``batch_patience_s``: seconds after which a batch request counts
    as interactive, the oldest alone at any time. ``layers``: of the model, between which a piece of a prefill may wait
    for the next step.
    """

    context_length: int
    max_running: int
    token_budget: int
    max_waiting: int
    prefix_cache: bool = True
    max_gap: float = 2.2
    batch_patience_s: float = 60.0
    layers: int = 1

    def __post_init__(self) -> None:
        lowest = {
            "context_length": 2,
            "max_running": 1,
            "token_budget": self.max_running,
            "max_waiting": 1,
            "layers": 1,
        }
        for name, least in lowest.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if self.max_gap != 0 and not 1 < self.max_gap < math.inf:
            raise ValueError(f"max_gap is {self.max_gap}, must be 0 or a finite number above 1")
        if not self.batch_patience_s >= 0:
            raise ValueError(f"batch_patience_s is {self.batch_patience_s}, must be at least 0")


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
    """The waiting queue is full; ``retry_after_s`` (seconds) estimates when it will have a place.

    ``tenant_limit``: how many of the ``n_waiting`` requests of this tenant may wait, where others of its priority
    could still come; None when nobody may. ``n_waiting`` are then all of the priority.
    """

    def __init__(self, n_waiting: int, retry_after_s: float, tenant_limit: float | None = None) -> None:
        super().__init__(n_waiting, retry_after_s, tenant_limit)
        self.retry_after_s = retry_after_s
        self.tenant_limit = tenant_limit

    def __str__(self) -> str:
        n_waiting, retry_after_s, limit = self.args
        if limit is None:
            return f"{n_waiting} requests are waiting, retry in {retry_after_s:.2f} s"
        return (
            f"{n_waiting} requests of this tenant are waiting, its share of the full queue is {limit:.1f}, "
            f"retry in {retry_after_s:.2f} s"
        )


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
    if not LEAST_SHARE <= request.share < math.inf:
        raise NeverFits("share", f"is {request.share}, must be a finite number of at least {LEAST_SHARE:g}")
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


def check_queue(
    request: GenerationRequest,
    n_new: int,
    waiting: Iterable[GenerationRequest],
    running: Iterable[GenerationRequest],
    max_waiting: int,
    retry_after_s: float,
) -> None:
    """QueueFull unless ``n_new`` requests like ``request`` may wait beside those that wait and run.

    Up to ``max_waiting`` of one priority may. Beyond that, and up to twice as many, a tenant still may up to its fair
    part of ``max_waiting``, by the shares of all tenants with requests of the priority: who fills the queue does
    not shut others out. An empty queue takes any number, since several choices come as one.
    """
    same = [r for r in waiting if r.priority is request.priority]
    n_after = len(same) + n_new
    if n_after <= max_waiting or not same:
        return
    shares = {r.tenant: r.share for r in (*same, *running) if r.priority is request.priority}
    shares[request.tenant] = request.share
    part = max_waiting * request.share / sum(shares.values())
    n_mine = sum(r.tenant == request.tenant for r in same)
    if n_after > 2 * max_waiting or len(shares) == 1:
        raise QueueFull(len(same), retry_after_s)
    if n_mine + n_new > math.ceil(part):
        raise QueueFull(n_mine, retry_after_s, part)


class Pace:
    """How fast the waiting queue moves, from the times (monotonic seconds) of the last starts."""

    _UNKNOWN_S = 1.0
    _LEAST_S, _MOST_S = 0.05, 30.0

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=32)

    def started(self, now: float, n: int = 1) -> None:
        """``n`` waiting requests began to run."""
        self._starts.extend([now] * n)

    def retry_after_s(self, now: float) -> float:
        """Seconds in which about one place comes free; they grow while nothing starts."""
        if not self._starts:
            return self._UNKNOWN_S
        interval = (now - self._starts[0]) / len(self._starts)
        return min(max(interval, self._LEAST_S), self._MOST_S)
