"""How many micro-batches a step is split into: predicted from measured times, kept only where it is measured to pay.

Prediction is MegaScale-Infer's (arXiv 2504.02263): with T_a and T_e the times that attention and experts compute, T_c
that of one transfer, both fleets stay busy from m = 2 (1 + T_c / max(T_a, T_e)) micro-batches on. It takes for granted
that half the rows take half the time and that the fleets do not share cores; whether that is so, trials tell.

Pure: no clock and no random source.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

MOST = 4
"""Micro-batches where the tuner chooses: more hide a transfer only where it takes longer than all computing."""

MIN_ROWS = 8
"""Rows of a micro-batch where the tuner chooses. Products of fewer rows take as long as of 8: the deterministic mode
computes on blocks of 8, and elsewhere reading the weights is what takes the time."""

MARGIN = 0.05
"""Of two numbers of micro-batches the larger has to save this share of the time. Less is noise."""

TRIAL = 8
"""Steps of a trial; the median is what counts."""

_RECENT = 4 * TRIAL
"""Steps with which a trial is compared, from just before it."""

FIRST_PAUSE, PAUSE = 8, 63 * TRIAL
"""Steps between trials, doubling from the first to the second: in the end 1 of 64 steps is a trial's."""

_NEWS = 1 / 8
"""Weight of the latest step in the smoothed times."""


class StepTimes(NamedTuple):
    """Of a step that is not split, in seconds: T_a, T_e, T_c, each over all MoE layers; only their ratios matter."""

    attention_s: float
    experts_s: float
    transfer_s: float

    def wanted(self, most: int) -> int:
        """Micro-batches, at most so many, that keep both fleets busy; 1 where they would save less than MARGIN."""
        slower = max(self.attention_s, self.experts_s)
        if most == 1 or slower <= 0:
            return 1
        count = min(most, math.ceil(2 * (1 + self.transfer_s / slower)))
        return count if self.step_s(count) < (1 - MARGIN) * self.step_s(1) else 1

    def step_s(self, count: int) -> float:
        """A step of ``count`` micro-batches takes what the slower fleet computes, or the way of one micro-batch.

        A transfer does not get shorter here: that of few rows is all latency.
        """
        computing = self.attention_s + self.experts_s
        return max(self.attention_s, self.experts_s, computing / count + 2 * self.transfer_s)

    def smoothed(self, new: StepTimes) -> StepTimes:
        """Moved towards a later step's."""
        return StepTimes(*(old + _NEWS * (latest - old) for old, latest in zip(self, new, strict=True)))


class _Bucket:
    """Steps of about as many rows. One number is in force; now and then another is tried for TRIAL steps."""

    def __init__(self, most: int) -> None:
        self.in_force = 1
        self.tried: int | None = None
        self._most = most
        self._times: StepTimes | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds per row, with the number in force
        self._trial: list[float] = []
        self._trials = 0
        self._pause = self._left = FIRST_PAUSE

    def learn(self, times: StepTimes) -> None:
        self._times = times if self._times is None else self._times.smoothed(times)

    def observe(self, count: int, row_s: float) -> None:
        """A step of ``count`` micro-batches took so many seconds per row."""
        if count == self.tried:
            self._trial.append(row_s)
            if len(self._trial) == TRIAL:
                self._decide(self.tried)
        elif count == self.in_force:
            self._recent.append(row_s)
            self._left -= 1
            if self._left <= 0:
                self._begin_trial()

    def _begin_trial(self) -> None:
        """Try the others in turn, from the wanted one down to 1, which also shows what the times are now."""
        assert self._times is not None  # the first steps are not split
        others = [n for n in range(self._times.wanted(self._most), 0, -1) if n != self.in_force]
        if others:
            self.tried = others[self._trials % len(others)]
            self._trials += 1

    def _decide(self, tried: int) -> None:
        costs = {self.in_force: median(self._recent), tried: median(self._trial)}
        few, many = sorted(costs)
        self.in_force = many if costs[many] < (1 - MARGIN) * costs[few] else few
        if self.in_force == tried:
            self._recent.clear()
        self._trial, self.tried = [], None
        self._pause = self._left = min(PAUSE, 2 * self._pause)


class MicroBatchTuner:
    """Chooses for each step. Steps whose rows have the same power of two below them are taken to be alike."""

    def __init__(self, most: int) -> None:
        """``most``: 0 to choose up to MOST, 1 never to split, else always to split into so many. Raises ValueError."""
        if most < 0:
            raise ValueError(f"most is {most}; allowed is 0 (choose), 1 (never split), or how many micro-batches")
        self._most = most
        self._buckets: dict[int, _Bucket] = {}

    @property
    def never_splits(self) -> bool:
        return self._most == 1

    def choose(self, rows: int) -> int:
        """Micro-batches for a step of ``rows`` rows, from 1 to ``rows``. Changes nothing."""
        if self._most:
            return min(self._most, rows)
        bucket = self._buckets.get(rows.bit_length())
        return 1 if bucket is None else bucket.tried or bucket.in_force

    def observe(
        self, rows: int, m: int, step_s: float, attention_s: float, experts_s: float, transfer_s: float
    ) -> None:
        """A step of ``rows`` rows in ``m`` micro-batches took ``step_s``; the other seconds are sums over its layers.

        These count only where ``m`` is 1: with several batches in flight, what one waits for is the work of another.
        """
        if self._most:
            return
        power = rows.bit_length()
        if power not in self._buckets:
            self._buckets[power] = _Bucket(max(1, min(MOST, (1 << power - 1) // MIN_ROWS)))
        if m == 1:
            self._buckets[power].learn(StepTimes(attention_s, experts_s, transfer_s))
        self._buckets[power].observe(m, step_s / rows)
