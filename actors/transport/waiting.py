"""Waiting that answers fast and burns nothing: a bounded phase of yielding polls, then the kernel.

A blocked thread takes 25-35 microseconds to wake across cores on a virtual machine, whatever wakes it;
polling with ``sched_yield`` does not, and unlike spinning on ``pause`` it leaves the core to whoever has
work. So poll for as long as that has been paying lately, at most ``spin_us``, and block for the rest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Events = TypeVar("Events", bound=Sequence[object])

_LONGEST_BLOCK_S = 3600.0
"""poll and epoll take a 32-bit number of milliseconds: an infinite deadline is waited for in slices."""

_LEAST_PENALTY = 16
_MOST_PENALTY = 1024


class Waiter:
    """Adaptive yield-then-block. ``spin_us`` microseconds bound one polling phase; 0 always blocks at once.

    The phase halves whenever it ends with nothing, down to none, and grows back when blocking turned out so
    short that polling would have caught it. A thread that idles thus polls a few times and then sleeps for
    good.

    Where threads outnumber cores a yield gives a whole time slice (milliseconds) to somebody else, to save a
    wake-up of microseconds. A phase that overran that much is followed by waits without one, four times as
    many after each such phase, up to 1024.
    """

    def __init__(self, spin_us: float = 50.0) -> None:
        if not 0.0 <= spin_us <= 10_000.0:
            raise ValueError(f"spin_us is {spin_us}; allowed are 0 to 10000 microseconds")
        self._longest = spin_us * 1e-6
        self._budget = self._longest
        self._penalty = _LEAST_PENALTY
        self._abstain = 0

    @property
    def budget_us(self) -> float:
        """Microseconds the next wait may poll."""
        return 0.0 if self._abstain else self._budget * 1e6

    def wait(self, poll: Callable[[float], Events], deadline: float) -> Events:
        """What ``poll(seconds)`` returns once that is not empty; empty when ``deadline`` (monotonic) passed."""
        start = time.monotonic()
        events: Events | None = None
        if self._abstain:
            self._abstain -= 1
        elif self._budget > 0.0:
            events = self._yielding(poll, min(start + self._budget, deadline))
            self._judge(time.monotonic() - start)
        while not events:
            left = deadline - time.monotonic()
            events = poll(min(left, _LONGEST_BLOCK_S) if left > 0.0 else 0.0)
            if left <= 0.0:
                break
        self._learn(time.monotonic() - start)
        return events

    def _yielding(self, poll: Callable[[float], Events], end: float) -> Events:
        while True:
            events = poll(0.0)
            if events or time.monotonic() >= end:
                return events
            os.sched_yield()

    def _judge(self, polled: float) -> None:
        if polled > 10.0 * self._longest:
            self._abstain = self._penalty
            self._penalty = min(4 * self._penalty, _MOST_PENALTY)
        elif self._penalty > _LEAST_PENALTY:
            self._penalty -= 1

    def _learn(self, waited: float) -> None:
        # A wake-up is in ``waited`` where we blocked, so up to twice the longest phase would have been
        # caught.
        if waited <= 2.0 * self._longest:
            self._budget = min(self._longest, max(2.0 * self._budget, self._longest / 4.0))
        else:
            self._budget = self._budget / 2.0 if self._budget > 2e-6 else 0.0
