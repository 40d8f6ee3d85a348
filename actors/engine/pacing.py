"""How many prompt tokens may be computed beside decodes, so that no stream waits long for its next token.

Chunked prefill beside decodes bounds the gaps between tokens (Sarathi-Serve, arXiv 2403.02310); here the size of the
chunks follows the times of the steps themselves, which differ between machines and grow with the context. No clock is
read: the times are handed in.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median


class GapBound:
    """Keeps steps with a prefill at ``max_gap`` times the usual decode-only step with about as many rows.

    A decode-only step usually takes the median U of the last few. A step with c prompt tokens that took T gives
    seconds per prompt token t = (T - U) / c, and the next may have c = (max_gap - 1) U / t: at its fixed point T is
    max_gap U, to within one prompt token, also if the first token costs more than the others. Where already
    ``LEAST`` tokens take T above that, pieces have ``LEAST`` tokens, and the bound is broken: prompts always move.

    t is one for all numbers of rows, U is not. So when most streams end, the next piece is smaller at once; a first
    token that costs more than the others is then underrated for a few steps, by at most that. Where no decode-only step
    was measured for long, one is made, by leaving the prefill out for one step.
    """

    LEAST = 8
    _REMEASURE = 256
    _SAMPLES = 15
    _KEPT = 0.9
    _GROWTH = 1.5
    _MUCH_LARGER = 1.5
    _SURE = 0.6
    _DEEPER = 1024
    _SHORTEST_S = 1e-9

    def __init__(self, max_gap: float) -> None:
        """``max_gap``: above 1, or 0 for no bound."""
        self._max_gap = max_gap
        self._timed = False
        self._most = self.LEAST  # a piece may be little larger than those measured
        self._seen: deque[tuple[int, float]] = deque(maxlen=self._SAMPLES)  # (tokens of a piece, t)
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
        return self._piece(median(self._usual_s[rows]))

    def first_allowance(self, context: int) -> int | None:
        """Bound for one prompt that already has ``context`` tokens; None: none of its own.

        Far behind all that was measured, a token may cost many times as much.
        """
        return self.LEAST if context > 2 * self._context + self._DEEPER else None

    def measured(self, n_decodes: int, n_prefill: int, context: int, elapsed_s: float) -> None:
        """A step took ``elapsed_s`` seconds; ``context``: tokens before the longest prompt's piece in it.

        A time that is not finite tells nothing; one that is not above 0, from a clock that is too coarse, is the
        shortest there is.
        """
        if not math.isfinite(elapsed_s):
            return
        elapsed_s = max(elapsed_s, self._SHORTEST_S)
        self._timed = True
        if n_decodes == 0:
            return
        rows = n_decodes.bit_length()
        if n_prefill == 0:
            self._usual_s.setdefault(rows, deque(maxlen=self._SAMPLES)).append(elapsed_s)
            self._n_mixed[rows] = 0
        elif rows in self._usual_s:
            self._n_mixed[rows] += 1
            if self.LEAST <= n_prefill <= self._most:  # steps that had no bound would tell of much larger pieces
                self._learn(median(self._usual_s[rows]), n_prefill, context, elapsed_s)

    def _piece(self, usual_s: float) -> int:
        if not self._seen:
            return self.LEAST
        # Not rounded down: where the first token is dear, one more makes t so little smaller that growth would end.
        wanted = (self._max_gap - 1) * usual_s / self._token_s()
        return max(self.LEAST, round(min(wanted, self._most)))

    def _token_s(self) -> float:
        """Seconds per prompt token: what most of the last pieces did not exceed, larger and later ones counting more.

        Close to the median, as what disturbs a step only ever makes it longer: a mean would follow each disturbance.
        """
        weights = {i: n * n * self._KEPT ** (len(self._seen) - i) for i, (n, _) in enumerate(self._seen)}
        enough, total = sum(weights.values()) * self._SURE, 0.0
        for i in sorted(weights, key=lambda i: self._seen[i][1]):
            total += weights[i]
            if total >= enough:
                break
        return self._seen[i][1]

    def _learn(self, usual_s: float, n_prefill: int, context: int, elapsed_s: float) -> None:
        if self.first_allowance(context) is not None:
            self._seen.clear()
        self._context = context
        piece = self._piece(usual_s)
        # Never nothing: a noisy step must not look as if prompts were free.
        self._seen.append((n_prefill, max(elapsed_s - usual_s, usual_s / 20) / n_prefill))
        if n_prefill >= piece:  # where they have become much smaller, the first token's cost is shared by fewer
            self._seen = deque((one for one in self._seen if one[0] <= self._MUCH_LARGER * n_prefill), self._SAMPLES)
            piece = int(self._GROWTH * piece)
        self._most = piece
