"""How long a step of running streams may take for the sake of prefills, so that none waits long for its next token.

Chunked prefill beside decodes bounds the gaps between tokens (Sarathi-Serve, arXiv 2403.02310). But small chunks are
dear: each brings the weights of all layers from memory again, and products of few rows are slow ones. So prefills are
cut between layers, too (layered prefill, "From Tokens to Layers", arXiv 2510.08055): a piece has as many rows as are
cheap, and in one step passes through as many layers as there is time for. No clock is read: times are handed in.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from actors.engine.plan import Pace


class GapBound:
    """Keeps steps with prefills at ``max_gap`` times the usual decode-only step with about as many rows.

    A decode-only step usually takes the median U of the last few. Where it was not measured for long, it is, by leaving
    the prefills out of one step. The time beside it, (max_gap - 1) U, is the prefills'; what a row takes of it on its
    way through the layers is the median of what the last steps took longer than U, divided by their rows. A piece has
    so many rows that it passes through several layers in a step; or, where these would be few, ``ENOUGH``, if as many
    pass through one. Pieces grow from ``LEAST`` rows, as they are measured. One moves by a layer a step at least: where
    that takes longer, the bound is broken.
    """

    LEAST = 8
    ENOUGH = 64
    """Rows, of which one more makes the others hardly any cheaper."""

    _LAYERS = 6
    """In a step: with larger pieces it would be by chance how well its time is used."""

    _REMEASURE = 256
    _SAMPLES = 15
    _USUAL_SAMPLES = 31
    _GROWTH = 4
    _DEEPER = 1024
    _SHORTEST_S = 1e-9

    def __init__(self, max_gap: float, layers: int = 1) -> None:
        """``max_gap``: above 1, or 0 for no bound. ``layers``: between which a piece may wait for the next step."""
        self._max_gap = max_gap
        self._layers = layers
        self._timed = False
        self._seen: deque[tuple[int, float]] = deque(maxlen=self._SAMPLES)  # (rows of a piece, seconds a row)
        self._context = 0
        # By rows, in powers of 2: times of decode-only steps, and the mixed steps since the last of them.
        self._usual_s: dict[int, deque[float]] = {}
        self._n_mixed: dict[int, int] = {}

    def pace(self, n_decodes: int) -> Pace | None:
        """Of a step with so many decodes; None: no bound, as long as no times are known."""
        if not self._max_gap or not self._timed or n_decodes == 0:
            return None
        rows = n_decodes.bit_length()
        if rows not in self._usual_s or self._n_mixed[rows] >= self._REMEASURE:
            return Pace(0.0, 0.0)
        usual_s = median(self._usual_s[rows])
        return Pace(self._max_gap * usual_s, usual_s, self._row_s())

    def rows(self, pace: Pace, context: int) -> int:
        """Of a new piece, beside the decodes of ``pace``; ``context``: the most tokens that any prompt of it has
        already. Far behind all that was measured, a row may cost many times as much."""
        if not self._seen or context > 2 * self._context + self._DEEPER:
            return self.LEAST
        spare_s = pace.limit_s - pace.usual_s
        through_one = spare_s * self._layers / pace.row_s
        rows = max(through_one / self._LAYERS, min(through_one, self.ENOUGH))
        return max(self.LEAST, round(min(rows, self._GROWTH * max(rows for rows, _ in self._seen))))

    def measured_alone(self, n_decodes: int, elapsed_s: float) -> None:
        """A step without prefills took ``elapsed_s`` seconds. A time that is not finite tells nothing; one that is not
        above 0, from a clock that is too coarse, is the shortest there is."""
        if not math.isfinite(elapsed_s):
            return
        self._timed = True
        if n_decodes:
            rows = n_decodes.bit_length()
            self._usual_s.setdefault(rows, deque(maxlen=self._USUAL_SAMPLES)).append(max(elapsed_s, self._SHORTEST_S))
            self._n_mixed[rows] = 0

    def measured_beside(
        self,
        pace: Pace,
        n_decodes: int,
        piece: int,
        passes: float,
        context: int,
        elapsed_s: float,
        apart_s: float = 0.0,
    ) -> None:
        """A step of that ``pace`` took ``elapsed_s`` seconds, in which ``passes`` rows passed through all layers, or
        more rows through some; ``piece`` is the number of rows of the first piece, ``context`` as for ``rows``,
        ``apart_s`` what this alone took, if that was measured. Else it is what the step took longer than usual: too
        much where the decodes' contexts have grown since."""
        if not math.isfinite(elapsed_s):
            return
        if n_decodes.bit_length() in self._n_mixed:
            self._n_mixed[n_decodes.bit_length()] += 1
        if context > 2 * self._context + self._DEEPER:
            self._seen.clear()
        self._context = context
        # Never nothing: a noisy step must not look as if prompts were free.
        spent_s = max(apart_s or elapsed_s - pace.usual_s, pace.usual_s / 20, self._SHORTEST_S)
        self._seen.append((piece, spent_s / passes))

    def _row_s(self) -> float:
        return median(row_s for _, row_s in self._seen) if self._seen else 0.0
