"""The border between what serves and what observes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger(__name__)

_SELDOM_S = 30.0


class Guard:
    """``with`` ends quietly whatever error ends the block: telemetry that fails must not cost a token.

    The error is logged, at most twice a minute. ``what`` names what is observed; ``clock`` in seconds.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._quiet_until = float("-inf")

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        now = self._clock()
        if now >= self._quiet_until:
            self._quiet_until = now + _SELDOM_S
            log.error("telemetry of %s fails; serving goes on", self._what, exc_info=error)
        return True
