"""How many prompt tokens may be computed beside decodes, so that no stream waits long for its next token.

Chunked prefill beside decodes bounds the gaps between tokens (Sarathi-Serve, arXiv 2403.02310); here the size of the
chunks follows the times of the steps themselves, which differ between machines and grow with the context. No clock is
read: the times are handed in.
"""

from __future__ import annotations

from collections import deque
from statistics import median


class GapBound:
    """Keeps steps with a prefill at ``max_gap`` times the usual decode-only step with about as many rows.

    A decode-only step usually takes the median U of the last few. A step with c prompt tokens that took T gives
    seconds per prompt token t = (T - U) / c, and the next may have c = (max_gap - 1) U / t: at its fixed point T is
    max_gap U, also if the first token costs more than the others. Where no decode-only step was measured for long, one
    is made, by leaving the prefill out for one step.
    """

    LEAST = 8
    _REMEASURE = 256
    _SAMPLES = 15
    _KEPT = 0.9
    _GROWTH = 1.5
    _STALL = 3.0
    _DEEPER = 1024

    def __init__(self, max_gap: float) -> None:
        """``max_gap``: above 1, or 0 for no bound."""
        self._max_gap = max_gap
        self._timed = False
        self._chunk = self.LEAST
        self._tokens = self._seconds = 0.0
        self._context = 0
        # By rows, in powers of 2: times of decode-only steps, and the mixed steps since the last of them.
        self._usual_s: dict[int, deque[float]] = {}
        self._n_mixed: dict[int, int] = {}

    def allowance(self, n_decodes: int) -> int | None:
        """Prompt tokens for a step beside so many decodes; None: no bound, as long as no times are known."""
        if not self._max_gap or not self._timed or n_decodes == 0:
            return None
        rows = n_decodes.bit_length()
        if rows not in self._usual_s or self._n_mixed[rows] >= self._REMEASURE:
            return 0
        return self._chunk

    def first_allowance(self, context: int) -> int | None:
        """Bound for one prompt that already has ``context`` tokens; None: none of its own.

        Far behind all that was measured, a token may cost many times as much.
        """
        return self.LEAST if context > 2 * self._context + self._DEEPER else None

    def measured(self, n_decodes: int, n_prefill: int, context: int, elapsed_s: float) -> None:
        """A step took ``elapsed_s`` seconds; ``context``: tokens before the longest prompt's piece in it."""
        self._timed = True
        if n_decodes == 0:
            return
        rows = n_decodes.bit_length()
        if n_prefill == 0:
            self._usual_s.setdefault(rows, deque(maxlen=self._SAMPLES)).append(elapsed_s)
            self._n_mixed[rows] = 0
        elif rows in self._usual_s:
            self._n_mixed[rows] += 1
            if self.LEAST <= n_prefill <= self._chunk:  # steps that had no bound would tell of much larger chunks
                self._learn(median(self._usual_s[rows]), n_prefill, context, elapsed_s)

    def _learn(self, usual_s: float, n_prefill: int, context: int, elapsed_s: float) -> None:
        if self.first_allowance(context) is not None:
            self._tokens = self._seconds = 0.0
            self._chunk = self.LEAST
        self._context = context
        # Never nothing: a noisy step must not look as if prompts were free. Never too much: one stall is no rule.
        spent_s = max(elapsed_s - usual_s, usual_s / 20)
        if self._tokens:
            spent_s = min(spent_s, self._STALL * n_prefill * self._seconds / self._tokens)
        # Least squares through the origin: the larger a chunk, the more it tells.
        self._tokens = self._KEPT * self._tokens + n_prefill * n_prefill
        self._seconds = self._KEPT * self._seconds + n_prefill * spent_s
        wanted = int((self._max_gap - 1) * usual_s * self._tokens / self._seconds)
        most = int(self._GROWTH * self._chunk) if n_prefill == self._chunk else self._chunk
        self._chunk = max(self.LEAST, min(wanted, most))
