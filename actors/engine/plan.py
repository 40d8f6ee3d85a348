"""One step of the engine, as the scheduler hands it to whoever computes it."""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine.request import Draw, TokenEvent


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request, computed in one step: a decode token or a piece of the prefill.

    ``token_ids[i]`` is the request's token at position ``start + i``; the ``start`` tokens before have their
    KV in the cache, and the new one's goes to slot ``slots[i]``. The KV of any position ``p < start +
    len(token_ids)`` lies in slot ``block_table[p // block_size] * block_size + p % block_size``. With a
    ``draw``, the logits of the last row yield a token of the answer; without, more of the prefill follows.
    ``prompt_targets`` are the prompt's tokens that follow the chunk's first rows, one each, where the prompt's
    log-probabilities are wanted (``prompt_logprobs`` of the likeliest beside each), else empty.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    slots: tuple[int, ...]
    block_table: tuple[int, ...]
    draw: Draw | None
    prompt_targets: tuple[int, ...] = ()
    prompt_logprobs: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What to compute in one step (perhaps nothing), the requests that ended before it was formed, and the ids of those
    that were preempted while it was.

    ``copies``: (from, to) blocks whose content has to be copied, in order, before anything is written: what is
    shared is copied before it changes.
    """

    chunks: tuple[Chunk, ...]
    events: tuple[TokenEvent, ...]
    preempted: tuple[str, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def sampled(self) -> tuple[Chunk, ...]:
        """The chunks that yield a token, in order: the rows of ``sample`` and the tokens of ``update``."""
        return tuple(chunk for chunk in self.chunks if chunk.draw is not None)
