"""How long to wait before the next attempt."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

FIRST_S = 0.25
LONGEST_S = 15.0

Sleep = Callable[[float], Awaitable[object]]


class Backoff:
    """Each wait is up to twice as long as the one before; not all rows come back at the same moment."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self._upper_s = FIRST_S

    def next(self, at_least_s: float = 0.0) -> float:
        """Seconds; ``at_least_s`` is what the server asked for."""
        upper_s, self._upper_s = self._upper_s, min(2 * self._upper_s, LONGEST_S)
        return at_least_s + upper_s * (1 + self._draw()) / 2
