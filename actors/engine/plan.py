"""One step of the engine, as the scheduler hands it to whoever computes it, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.engine.request import Draw, TokenEvent


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request: a decode token or a piece of the prefill.

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


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks of prefills that pass through the layers together, in one step or in several.

    As long as its ``number`` is the same, so is what was computed of it before; chunks may be fewer, where requests
    ended or were preempted, and blocks may have moved.
    """

    number: int
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a step with pieces of prefills may take: about ``limit_s`` seconds, of which its decodes usually take
    ``usual_s``; 0: nothing of the pieces is computed. ``row_s``: the seconds that a row of a piece takes on its way
    through all layers; 0: not known."""

    limit_s: float
    usual_s: float
    row_s: float = 0.0

    def allows(self, elapsed_s: float, share: float, rest_s: float, layer_s: float) -> bool:
        """Whether one more layer of a piece, which takes ``layer_s``, may be computed ``elapsed_s`` after the step's
        beginning, where the pieces may have a ``share`` of their time by then, of 1, and the decodes still take
        ``rest_s``. Half a layer more or less: on average it is the limit."""
        by_now_s = self.limit_s - rest_s - (1 - share) * (self.limit_s - self.usual_s)
        return share > 0 and elapsed_s + layer_s / 2 <= by_now_s


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What to compute in one step (perhaps nothing), the requests that ended before it was formed, and the ids of those
    that were preempted while it was.

    ``chunks`` are computed to their end. ``pieces`` are all that are under way, in order: with a ``pace`` they get as
    far as that allows, at least by one layer, and the rest follows in later steps; without, to their end.
    ``copies``: (from, to) blocks whose content has to be copied, in order, before anything is written: what is
    shared is copied before it changes.
    """

    chunks: tuple[Chunk, ...]
    events: tuple[TokenEvent, ...]
    preempted: tuple[str, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    pieces: tuple[Piece, ...] = ()
    pace: Pace | None = None

    @property
    def empty(self) -> bool:
        """There is nothing to compute."""
        return not self.chunks and not self.pieces

    @property
    def all_chunks(self) -> tuple[Chunk, ...]:
        """Those of the pieces too."""
        return (*self.chunks, *(chunk for piece in self.pieces for chunk in piece.chunks))

    @property
    def sampled(self) -> tuple[Chunk, ...]:
        """Those of ``chunks`` that yield a token, in order: the rows of ``sample`` and the tokens of ``update``."""
        return drawing(self.chunks)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step came with its pieces. ``finished``: for each of the first ones, that are finished, the tokens
    that were drawn; ``passes``: rows that passed through all layers, in fractions. ``apart_s``: the seconds that this
    took, where nothing else was computed meanwhile; 0 where decodes were."""

    finished: tuple[tuple[int | None, ...], ...] = ()
    passes: float = 0.0
    apart_s: float = 0.0


def drawing(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """Those that yield a token."""
    return tuple(chunk for chunk in chunks if chunk.draw is not None)
