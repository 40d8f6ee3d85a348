"""How long a batch bears a cluster that gives nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.batch.errors import OutOfPatience


class Patience:
    """Ends when there were ``limit_s`` seconds of trouble without a token between them. What is slow without trouble
    may take as long as it likes; trouble that goes and comes again adds up."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._since: float | None = None
        self._earlier_s = 0.0
        self._what = ""

    def progress(self) -> None:
        """A token came: whatever was wrong is over."""
        self._since = None
        self._earlier_s = 0.0

    def calm(self) -> None:
        """A row is sent, so the gateway is there as far as one knows: while it is silent, that is not trouble. What was
        before is not forgotten, as a cluster that cannot compute may look ready again and again."""
        self._earlier_s = self._spent_s()
        self._since = None

    def trouble(self, what: str) -> None:
        """Something went wrong that may pass. Raises OutOfPatience when that has been so for too long."""
        if self._since is None:
            self._since = self._clock()
        self._what = what
        if self._spent_s() > self._limit_s:
            raise OutOfPatience(f"no token came for {self._limit_s:g} s (--patience): {what}")

    def lasting(self, at_least_s: float) -> str:
        """What has been wrong for so long, or ""."""
        long = self._since is not None and self._spent_s() >= at_least_s
        return self._what if long else ""

    def _spent_s(self) -> float:
        """Seconds of trouble since the last token."""
        return self._earlier_s + (self._clock() - self._since if self._since is not None else 0.0)
