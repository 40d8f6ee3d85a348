"""One step of the engine, as the scheduler hands it to whoever computes it."""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine.request import SamplingParams, TokenEvent


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request, computed in one step: a decode token or a piece of the prefill.

    ``token_ids[i]`` is the request's token at position ``start + i``; the ``start`` tokens before have their
    KV in the cache, and the new one's goes to slot ``slots[i]``. The KV of any position ``p < start +
    len(token_ids)`` lies in slot ``block_table[p // block_size] * block_size + p % block_size``. With
    ``sample``, the logits of the last row yield the generated token number ``index``, drawn by ``sampling``;
    without, more of the prefill follows.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    slots: tuple[int, ...]
    block_table: tuple[int, ...]
    sample: bool
    sampling: SamplingParams
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What to compute in one step (perhaps nothing), the requests that ended before it was formed, and the ids of those
    that were preempted while it was."""

    chunks: tuple[Chunk, ...]
    events: tuple[TokenEvent, ...]
    preempted: tuple[str, ...] = ()

    @property
    def sampled(self) -> tuple[Chunk, ...]:
        """The chunks that yield a token, in order: the rows of ``sample`` and the tokens of ``update``."""
        return tuple(chunk for chunk in self.chunks if chunk.sample)
