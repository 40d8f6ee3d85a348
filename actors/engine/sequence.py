"""The engine's state of one request."""

from __future__ import annotations

from enum import StrEnum

from actors.engine.plan import Chunk
from actors.engine.request import Draw, FinishReason, GenerationRequest


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Sequence:
    """A request's tokens, how many of them are in the KV cache, and where.

    ``token_ids`` are prompt and generated tokens together; the first ``n_computed`` of them have their KV in
    the blocks of ``block_table``. At least one token is never computed yet: the one whose logits give the
    next token. ``arrival`` orders sequences; ``deadline`` is an absolute monotonic time in seconds, or None.
    """

    def __init__(self, request: GenerationRequest, arrival: int, deadline: float | None) -> None:
        self.request = request
        self.arrival = arrival
        self.deadline = deadline
        self.token_ids = [*request.prompt_ids, *request.generated_ids]
        self.n_computed = 0
        # A tuple: chunks share it without a copy, and it is replaced once per block, not once per token.
        self.block_table: tuple[int, ...] = ()
        self.status = Status.WAITING

    @property
    def n_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def n_uncomputed(self) -> int:
        """Tokens still to compute before the next one can be drawn: 1 while decoding, more in the prefill."""
        return len(self.token_ids) - self.n_computed

    def chunk(self, n_tokens: int, block_size: int) -> Chunk:
        """The next ``n_tokens`` tokens as a piece of a step; the block table must have room for them."""
        start, end = self.n_computed, self.n_computed + n_tokens
        table = self.block_table
        return Chunk(
            request_id=self.request.request_id,
            token_ids=tuple(self.token_ids[start:end]),
            start=start,
            slots=tuple(table[p // block_size] * block_size + p % block_size for p in range(start, end)),
            block_table=table,
            draw=Draw(self.request.sampling, self.n_generated) if end == len(self.token_ids) else None,
        )

    def finish_reason(self, context_length: int) -> FinishReason | None:
        """Why the token that was generated last ends the sequence, or None when it goes on."""
        if self.token_ids[-1] in self.request.stop_ids:
            return FinishReason.STOP
        if self.n_generated >= self.request.max_tokens or len(self.token_ids) >= context_length:
            return FinishReason.LENGTH
        return None
