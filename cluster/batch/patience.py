"""How long a batch bears a cluster that gives nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.batch.errors import OutOfPatience


class Patience:
    """Ends when there was only trouble for ``limit_s`` seconds. What is slow without trouble may take as long as it
    likes."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._since: float | None = None
        self._what = ""

    def progress(self) -> None:
        """A token came: whatever was wrong is over."""
        self._since = None

    def trouble(self, what: str) -> None:
        """Something went wrong that may pass. Raises OutOfPatience when that has been so for too long."""
        now = self._clock()
        if self._since is None:
            self._since = now
        self._what = what
        if now - self._since > self._limit_s:
            raise OutOfPatience(f"no token came for {self._limit_s:g} s (--patience): {what}")

    def lasting(self, at_least_s: float) -> str:
        """What has been wrong for so long, or ""."""
        long = self._since is not None and self._clock() - self._since >= at_least_s
        return self._what if long else ""
