"""The log of clients that got no wire: a flood of strangers must not fill it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

LINE_EVERY_S = 5.0

log = logging.getLogger(__name__)


class RefusalLog:
    """Warns of refused clients at most once in LINE_EVERY_S; each line tells how many had none since the last.

    Thread-safe. ``clock`` gives monotonic seconds.
    """

    def __init__(self, endpoint: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._lock = threading.Lock()
        self._quiet_until = float("-inf")
        self._left_out = 0

    def refused(self, client: str, error: Exception) -> None:
        """``client`` was refused because of ``error``."""
        with self._lock:
            now = self._clock()
            if now < self._quiet_until:
                self._left_out += 1
                return
            self._quiet_until = now + LINE_EVERY_S
            left_out, self._left_out = self._left_out, 0
        others = f" (and {left_out} more since the last such line)" if left_out else ""
        log.warning("endpoint %s refused a %s: %s%s", self._endpoint, client, error, others)
