"""The engine's state of one request."""

from __future__ import annotations

from array import array
from enum import StrEnum
from itertools import chain, islice

from actors.engine.plan import Chunk
from actors.engine.prefix import PrefixKeys
from actors.engine.request import Draw, FinishReason, GenerationRequest, Priority


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Sequence:
    """A request's tokens, how many of them are in the KV cache, and where.

    ``token_ids`` are prompt and generated tokens together, ``n_given`` of them came with the request. The first
    ``n_computed`` have their KV in the blocks of ``block_table``; the first ``n_verified`` of these were attended to
    by logits from which a token could be drawn, and their full blocks, ``n_published`` of them, are in the prefix
    cache. ``n_reused``: tokens that were there already when the sequence last started; ``n_cached``: prompt tokens that
    it found in the prefix cache before its first token, or that the sibling did from which it has them. At least one
    token is never computed yet: the one whose logits give the next token.

    ``n_under_way`` tokens behind those computed belong to pieces of prefills that are under way; ``run`` changes where
    these are lost.

    ``priority`` is the class in which the request counts, which is above its own where a batch request has waited long;
    ``arrival`` (set by the lineup) orders those of a class. ``deadline`` and ``patient_until`` are absolute monotonic
    times in seconds.
    """

    def __init__(
        self,
        request: GenerationRequest,
        keys: PrefixKeys,
        deadline: float | None = None,
        patient_until: float = 0.0,
    ) -> None:
        self.request = request
        self.arrival = 0
        self.keys = keys
        self.deadline = deadline
        self.patient_until = patient_until
        self.priority: Priority = request.priority
        self.status = Status.WAITING
        self.token_ids = [*request.prompt_ids, *request.generated_ids]
        self.n_given = len(self.token_ids)
        # A tuple: chunks share it without a copy, and it is replaced once per block, not once per token.
        self.block_table: tuple[int, ...] = ()
        self.n_computed = self.n_verified = self.n_published = self.n_reused = self.n_cached = 0
        self.n_under_way = self.run = 0
        self.n_charged = 0  # of the tokens given: charged to the tenant, once even if they are computed again
        self.was_preempted = False
        self.siblings = [self]  # the choices of one request that are in the engine, by arrival: a list that they share
        self.awaited: bytes | None = None  # the key of a block that somebody else was computing, see Reuse
        # What penalties look at, as arrays: the sampler reads these in place, tuples it would convert at every step.
        self._prompt_ids = array("q", _distinct_prompt_ids(request))
        self._generated_ids = array("q")  # those of the draws so far

    @property
    def rank(self) -> tuple[int, int]:
        """Running sequences with a lower one take KV blocks from those with a higher one."""
        return self.priority, self.arrival

    @property
    def n_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def n_drawn(self) -> int:
        """Tokens generated in this engine."""
        return len(self.token_ids) - self.n_given

    @property
    def n_uncomputed(self) -> int:
        """Tokens still to compute before the next one can be drawn: 1 while decoding, more in the prefill."""
        return len(self.token_ids) - self.n_computed

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether every row of the prompt is still to be computed, for its log-probabilities."""
        return self.request.prompt_logprobs is not None and self.n_generated == 0

    def lose_under_way(self) -> None:
        """It is part of no piece any more."""
        self.n_under_way = 0
        self.run += 1

    def forget_computed(self) -> None:
        """It holds no blocks any more."""
        self.block_table = ()
        self.n_computed = self.n_verified = self.n_published = self.n_reused = 0
        self.lose_under_way()

    @property
    def decodes(self) -> bool:
        """Whether its next token is the next one to be drawn for it."""
        return self.n_uncomputed == 1 and not self.n_under_way

    def chunk(self, start: int, n_tokens: int, block_size: int) -> Chunk:
        """``n_tokens`` tokens from position ``start`` on, as a part of a step; the block table must have room."""
        end = start + n_tokens
        wants_prompt_rows = self.wants_prompt_rows
        return Chunk(
            request_id=self.request.request_id,
            token_ids=tuple(self.token_ids[start:end]),
            start=start,
            slots=_slots(self.block_table, start, end, block_size),
            block_table=self.block_table,
            draw=self._draw() if end == len(self.token_ids) else None,
            prompt_targets=self.request.prompt_ids[start + 1 : end + 1] if wants_prompt_rows else (),
            prompt_logprobs=(self.request.prompt_logprobs or 0) if wants_prompt_rows else 0,
        )

    def finish_reason(self, context_length: int) -> FinishReason | None:
        """Why the token that was generated last ends the sequence, or None when it goes on."""
        if self.token_ids[-1] in self.request.stop_ids:
            return FinishReason.STOP
        if self.n_generated >= self.request.max_tokens or len(self.token_ids) >= context_length:
            return FinishReason.LENGTH
        return None

    def _draw(self) -> Draw:
        request, index = self.request, self.n_generated
        held_back = request.stop_ids if index < request.sampling.min_tokens else frozenset()
        if not request.sampling.has_penalties:
            return Draw(request.sampling, index, held_back)
        n_known = len(request.prompt_ids) + len(self._generated_ids)
        self._generated_ids.extend(self.token_ids[n_known:])
        return Draw(request.sampling, index, held_back, self._prompt_ids, self._generated_ids[:])


def _distinct_prompt_ids(request: GenerationRequest) -> list[int]:
    """In rising order, in which the sampler goes through a row of logits several times as fast; empty where no penalty
    looks at them."""
    return sorted(set(request.prompt_ids)) if request.sampling.repetition_penalty != 1 else []


def _slots(table: tuple[int, ...], start: int, end: int, block_size: int) -> tuple[int, ...]:
    """Where positions ``start`` to ``end`` (exclusive) lie."""
    first, offset = divmod(start, block_size)
    if end == start + 1:  # a decode row: there are many of them in a step
        return (table[first] * block_size + offset,)
    blocks = (range(block * block_size, (block + 1) * block_size) for block in islice(table, first, None))
    return tuple(islice(chain.from_iterable(blocks), offset, offset + end - start))
