"""What the engine's tests make again and again, and the fake model that they compute with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

from actors.engine.kv_blocks import BlockPool
from actors.engine.plan import Chunk, Progress, StepPlan, drawing
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
    **limits: Any,
) -> Scheduler:
    return Scheduler(
        SchedulerLimits(context_length, max_running, token_budget, max_waiting, **limits),
        BlockPool(n_blocks, block_size),
    )


def make_request(
    request_id: str = "r",
    prompt: int | tuple[int, ...] = 5,
    max_tokens: int = 4,
    sampling: SamplingParams | None = None,
    **fields: Any,
) -> GenerationRequest:
    """``prompt``: its ids, or how many there are; those of two ids then have nothing in common."""
    first = crc32(request_id.encode()) * 1000
    ids = tuple(range(first, first + prompt)) if isinstance(prompt, int) else prompt
    return GenerationRequest(request_id, ids, sampling or SamplingParams(), max_tokens, **fields)


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
    """A KV cache of token ids, written and read as a model would: by slots and through block tables.

    ``owners``: for whom a request's KV is computed (its tenant and adapter); what was computed for others reads as
    poison. ``bad_from``: the position from which on a request's rows are not finite: they poison the slots.
    """

    POISON = (None, -1)

    def __init__(
        self, blocks: BlockPool, owners: Mapping[str, object] | None = None, bad_from: Mapping[str, int] | None = None
    ) -> None:
        self.block_size = blocks.block_size
        self.slots: list[tuple[object, int]] = [self.POISON] * (blocks.n_blocks * blocks.block_size)
        self.owners = owners or {}
        self.bad_from = bad_from or {}
        self.progress = Progress()
        self._passed: dict[int, dict[str, int | None]] = {}  # of pieces: what their chunks draw, by request

    def run(self, plan: StepPlan) -> list[int | None]:
        """Compute the step: one token for each chunk that samples, None where a row is not finite. Pieces are computed
        to their end, where anything of them may be computed; ``progress`` tells that.

        As in a model's layer, all rows are written before any is read.
        """
        tokens = self.run_chunks(plan)
        self.progress = Progress()
        if plan.pace is None or plan.pace.limit_s:
            self.progress = self.advance(plan, len(plan.pieces))
        return tokens

    def run_chunks(self, plan: StepPlan) -> list[int | None]:
        """The same, but for the pieces."""
        for source, target in plan.copies:
            self.slots[self._of(target)] = self.slots[self._of(source)]
        for chunk in plan.chunks:
            self.write(chunk)
        return [self.read(chunk) for chunk in plan.sampled]

    def advance(self, plan: StepPlan, finished: int, pass_early: bool = False) -> Progress:
        """So many pieces are finished. The next one is on its way through the layers: the layer that counts here it may
        pass early, in a step before that in which it is finished."""
        self._passed = {p.number: self._passed[p.number] for p in plan.pieces if p.number in self._passed}
        for piece in plan.pieces[: finished + pass_early]:
            if piece.number not in self._passed:
                for chunk in piece.chunks:
                    self.write(chunk)
                self._passed[piece.number] = {chunk.request_id: self.read(chunk) for chunk in drawing(piece.chunks)}
        done = plan.pieces[:finished]
        told = tuple(tuple(self._passed[p.number][chunk.request_id] for chunk in drawing(p.chunks)) for p in done)
        return Progress(told, sum(piece.rows for piece in done) + 0.5 * (finished < len(plan.pieces)))

    def write(self, chunk: Chunk) -> None:
        owner = self.owners.get(chunk.request_id, "")
        bad_from = self.bad_from.get(chunk.request_id, 1 << 30)
        for i, (slot, token) in enumerate(zip(chunk.slots, chunk.token_ids, strict=True)):
            self.slots[slot] = (owner, token) if chunk.start + i < bad_from else self.POISON

    def read(self, chunk: Chunk) -> int | None:
        """The token that follows the request's whole history, as it is in the cache."""
        end = chunk.start + len(chunk.token_ids)
        history: list[tuple[object, int]] = []
        for block in chunk.block_table:
            history += self.slots[self._of(block)]
        if end > self.bad_from.get(chunk.request_id, end):
            return None
        owner = self.owners.get(chunk.request_id, "")
        return next_token(tuple(token if whose == owner else -1 for whose, token in history[:end]))

    def poison_all_but(self, blocks: Iterable[int]) -> None:
        kept = set(blocks)
        for block in range(len(self.slots) // self.block_size):
            if block not in kept:
                self.slots[self._of(block)] = [self.POISON] * self.block_size

    def _of(self, block: int) -> slice:
        return slice(block * self.block_size, (block + 1) * self.block_size)


def drain(scheduler: Scheduler, cache: FakeCache, now: float = 0.0, max_steps: int = 1000) -> list[TokenEvent]:
    """Run undisturbed steps until the scheduler is idle; their events."""
    events: list[TokenEvent] = []
    for _ in range(max_steps):
        if scheduler.idle:
            return events
        plan = scheduler.schedule(now)
        assert not plan.empty or not scheduler.n_running
        events += plan.events
        events += scheduler.update(plan, cache.run(plan), progress=cache.progress)
        scheduler.check()
    raise AssertionError(f"not idle after {max_steps} steps: {scheduler.n_running=} {scheduler.n_waiting=}")
