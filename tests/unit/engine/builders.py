"""What the engine's tests make again and again, and the fake model that they compute with."""

from __future__ import annotations

from actors.engine.kv_blocks import BlockPool
from actors.engine.plan import Chunk, StepPlan
from actors.engine.request import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from actors.engine.scheduler import Scheduler, SchedulerLimits

VOCABULARY = 97


def make_scheduler(
    n_blocks: int = 64,
    block_size: int = 4,
    context_length: int = 64,
    max_running: int = 8,
    token_budget: int = 16,
    max_waiting: int = 32,
) -> Scheduler:
    limits = SchedulerLimits(context_length, max_running, token_budget, max_waiting)
    return Scheduler(limits, BlockPool(n_blocks, block_size))


def make_request(
    request_id: str = "r",
    prompt: int | tuple[int, ...] = 5,
    max_tokens: int = 4,
    stop_ids: frozenset[int] = frozenset(),
    timeout_s: float | None = None,
    generated_ids: tuple[int, ...] = (),
    replay: bool = False,
) -> GenerationRequest:
    """``prompt``: its ids, or how many there are."""
    ids = tuple(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=ids,
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        timeout_s=timeout_s,
        generated_ids=generated_ids,
        replay=replay,
    )


def next_token(token_ids: tuple[int, ...]) -> int:
    """The fake model: any change, loss, repetition or move of a token changes what follows."""
    return hash((token_ids, len(token_ids))) % VOCABULARY


def lone_run(request: GenerationRequest, context_length: int) -> list[TokenEvent]:
    """The events of a request that nothing disturbs, computed without an engine."""
    token_ids = [*request.prompt_ids, *request.generated_ids]
    events: list[TokenEvent] = []
    finish = None
    while finish is None:
        token = next_token(tuple(token_ids))
        index = len(token_ids) - len(request.prompt_ids)
        token_ids.append(token)
        if token in request.stop_ids:
            finish = FinishReason.STOP
        elif index + 1 == request.max_tokens or len(token_ids) == context_length:
            finish = FinishReason.LENGTH
        events.append(TokenEvent(request.request_id, index, token, finish))
    return events


class FakeCache:
    """A KV cache of token ids, written and read as a model would: by slots and through block tables."""

    POISON = -1

    def __init__(self, blocks: BlockPool) -> None:
        self.block_size = blocks.block_size
        self.slots = [self.POISON] * (blocks.n_blocks * blocks.block_size)

    def compute(self, chunk: Chunk) -> int:
        """Write the chunk's tokens, read the request's whole history back, and return the next token."""
        for slot, token in zip(chunk.slots, chunk.token_ids, strict=True):
            self.slots[slot] = token
        history = []
        for position in range(chunk.start + len(chunk.token_ids)):
            block, offset = divmod(position, self.block_size)
            history.append(self.slots[chunk.block_table[block] * self.block_size + offset])
        return next_token(tuple(history))

    def run(self, plan: StepPlan) -> list[int]:
        """Compute the step: one token for each chunk that samples."""
        computed = [(chunk.draw is not None, self.compute(chunk)) for chunk in plan.chunks]
        return [token for sample, token in computed if sample]

    def poison_all_but(self, blocks: set[int]) -> None:
        for block in range(len(self.slots) // self.block_size):
            if block not in blocks:
                at = block * self.block_size
                self.slots[at : at + self.block_size] = [self.POISON] * self.block_size


def drain(scheduler: Scheduler, cache: FakeCache, now: float = 0.0, max_steps: int = 1000) -> list[TokenEvent]:
    """Run undisturbed steps until the scheduler is idle; their events."""
    events: list[TokenEvent] = []
    for _ in range(max_steps):
        if scheduler.idle:
            return events
        plan = scheduler.schedule(now)
        events += plan.events
        events += scheduler.update(plan, cache.run(plan))
        scheduler.check()
    raise AssertionError(f"not idle after {max_steps} steps: {scheduler.n_running=} {scheduler.n_waiting=}")
