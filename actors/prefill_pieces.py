"""Pieces of prefills on their way through the layers beside the decodes of one step or of several.

Source: layered prefill ("From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving with Layered Prefill",
arXiv 2510.08055).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from actors.engine.plan import Chunk, Piece, Progress, StepPlan, drawing
from actors.model.decoder import AttentionModel, Halted, MoE, Pass
from actors.model.kv_cache import KVCache
from actors.step_batch import step_batch

Draw = Callable[[Sequence[Chunk], Tensor], dict[str, int | None]]
"""By request, what the chunks give that draw; of the hidden rows that ``step_batch`` asks for."""


class _Waiting(NamedTuple):
    """Where a piece halted, and whose rows these are: (request, number of rows) each."""

    halted: Halted
    rows: tuple[tuple[str, int], ...]


class PrefillPieces:
    """Those of one attention shard that wait for its next step, by number.

    ``apart``: the experts compute on the same cores, where two batches under way would only be in each other's way.
    """

    _STEPS = 15

    def __init__(self, model: AttentionModel, cache: KVCache, device: torch.device, apart: bool) -> None:
        self.apart = apart
        self.moe_layers = len(model.spec.moe_layers)
        self.layers = model.spec.moe_layers[-1] + 1  # what follows is computed with the last answer
        self._model = model
        self._cache = cache
        self._device = device
        self._waiting: dict[int, _Waiting] = {}
        self._ends_s: deque[float] = deque(maxlen=self._STEPS)

    @property
    def end_s(self) -> float:
        """Seconds that a step's decodes usually take from where pieces are let advance for the last time."""
        return median(self._ends_s) if self._ends_s else 0.0

    def note_end(self, end_s: float) -> None:
        """What ``end_s`` was in a step of decodes."""
        self._ends_s.append(end_s)

    def keep(self, pieces: Sequence[Piece]) -> None:
        """All others are forgotten."""
        numbers = {piece.number for piece in pieces}
        self._waiting = {number: one for number, one in self._waiting.items() if number in numbers}

    def go_on(self, piece: Piece, moe: MoE, micro_batch: int) -> Going:
        """Its way through the layers, from the beginning or from where it waits."""
        batch = step_batch(piece.chunks, self._device)
        waiting = self._waiting.pop(piece.number, None)
        halted = None if waiting is None else _of(piece, waiting)
        return Going(piece, batch.output_rows, self._model.layers(batch, self._cache, moe, micro_batch, halted))

    def wait(self, piece: Piece, halted: Halted) -> None:
        """It goes on in a later step."""
        self._waiting[piece.number] = _Waiting(halted, _rows(piece))


class Going(NamedTuple):
    """A piece that some layers have been asked for; of its rows ``output_rows`` hidden ones are wanted."""

    piece: Piece
    output_rows: Tensor
    way: Pass


class StepPieces:
    """Implements ``actors.model.decoder.Beside``: the pieces of one step, one after the other, as its pace allows.

    Where fleets have cores of their own, pieces and decodes ping-pong, layer by layer. ``apart``, pieces are computed
    all at once, before the last layer of the decodes: as late as can be, when it is known best how much time is left.
    """

    def __init__(
        self, waiting: PrefillPieces, plan: StepPlan, moe: MoE, micro_batches: int, draw: Draw, began: float
    ) -> None:
        """For a step of so many micro-batches that ``began`` then (perf_counter)."""
        waiting.keep(plan.pieces)
        self.apart = waiting.apart
        self._waiting = waiting
        self._pace = plan.pace
        self._left = [*plan.pieces] if plan.pace is None or plan.pace.limit_s else []
        self._moe = moe
        # A step ends with micro-batch 0 of the last layer: of a piece only where there is nothing else.
        self._numbers: Iterator[int] = count(micro_batches) if micro_batches else reversed(range(len(plan.pieces)))
        self._draw = draw
        self._began = began
        self._going: Going | None = None
        self._asked = False
        self._halted: Halted | None = None
        self._finished: list[tuple[int | None, ...]] = []
        self._passes = self._apart_s = 0.0
        self._advanced = began
        self._decodes = all(len(chunk.token_ids) == 1 for chunk in plan.chunks)

    @property
    def progress(self) -> Progress:
        return Progress(tuple(self._finished), self._passes, self._apart_s)

    def advance(self, number: int) -> None:
        """See ``Beside``. By one layer of a step at least; without a pace all, in the end."""
        last = number + 1 == self._waiting.moe_layers
        if self.apart and not last:
            return
        began = time.perf_counter()
        while (self._going or self._left) and self._may_advance(number, last):
            self._answer()
            self._ask()
            if self.apart:
                self._answer()
        self._advanced = time.perf_counter()
        if self.apart and self._passes:
            self._apart_s = self._advanced - began

    def halt(self) -> None:
        """See ``Beside``."""
        self._answer()
        if self._going is not None and self._halted is not None:
            self._waiting.wait(self._going.piece, self._halted)
        self.close()

    def over(self) -> None:
        """So is the step."""
        if self._decodes:
            self._waiting.note_end(time.perf_counter() - self._advanced)

    def close(self) -> None:
        """Nothing of it is computed any more."""
        if self._going is not None:
            self._going.way.close()
            self._going = None

    def _may_advance(self, number: int, last: bool) -> bool:
        if self._pace is None or (last and not self._passes):
            return last
        layers, rows = self._waiting.moe_layers, (self._going.piece if self._going else self._left[0]).rows
        share = 1.0 if last else number / (layers - 1)
        rest_s = self._waiting.end_s + (1 - (number + 1) / layers) * self._pace.usual_s
        elapsed_s = time.perf_counter() - self._began
        return self._pace.allows(elapsed_s, share, rest_s, rows * self._pace.row_s / layers)

    def _ask(self) -> None:
        """For the next layer of the piece that is going, or the first of the next one."""
        if self._going is None:
            if not self._left:
                return
            self._going = self._waiting.go_on(self._left.pop(0), self._moe, next(self._numbers))
        next(self._going.way)
        self._asked = True
        self._passes += self._going.piece.rows / self._waiting.moe_layers

    def _answer(self) -> None:
        """What was asked for is there; behind the last layer the piece is finished."""
        if self._going is None or not self._asked:
            return
        self._asked = False
        came = self._going.way.send(True)
        assert isinstance(came, Halted)
        self._halted = came
        if came.layer == self._waiting.layers:
            self._finish(next(self._going.way))

    def _finish(self, came: Halted | Tensor | None) -> None:
        assert isinstance(came, Tensor)
        assert self._going is not None
        chunks = self._going.piece.chunks
        drawn = self._draw(chunks, came[self._going.output_rows])
        self._finished.append(tuple(drawn[chunk.request_id] for chunk in drawing(chunks)))
        self.close()


def _rows(piece: Piece) -> tuple[tuple[str, int], ...]:
    return tuple((chunk.request_id, len(chunk.token_ids)) for chunk in piece.chunks)


def _of(piece: Piece, waiting: _Waiting) -> Halted:
    """What waits of those whose chunks are part of the piece still."""
    if _rows(piece) == waiting.rows:
        return waiting.halted
    starts = accumulate((n for _, n in waiting.rows), initial=0)
    rows = {name: range(start, start + n) for start, (name, n) in zip(starts, waiting.rows, strict=False)}
    kept = [row for chunk in piece.chunks for row in rows[chunk.request_id]]
    return waiting.halted.only(torch.tensor(kept, device=waiting.halted.x.device))
