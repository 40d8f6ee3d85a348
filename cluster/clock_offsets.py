"""How far another machine's clock is from ours, by asking it.

Source: Cristian, "Probabilistic clock synchronization", Distributed Computing 3 (1989).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster.fleet import ActorHandle

log = logging.getLogger(__name__)

_PINGS = 8
_PING_TIMEOUT_S = 2.0


class ClockOffset(NamedTuple):
    """Another clock shows ``offset_ns`` more than ours, give or take ``error_ns``."""

    offset_ns: int = 0
    error_ns: int = 0


def measure(
    there: Sequence[ActorHandle], now_ns: Callable[[], int] = time.monotonic_ns, pings: int = _PINGS
) -> ClockOffset | None:
    """By asking the actors ``there``, which share a clock, in turn. None if nobody answers.

    The answer was given between question and receipt; the pair that is closest together tells the most.
    """
    handles = [there[number % len(there)] for number in range(pings)]
    offsets = [offset for handle in handles if (offset := _ping(handle, now_ns)) is not None]
    return min(offsets, key=lambda offset: offset.error_ns, default=None)


def _ping(handle: ActorHandle, now_ns: Callable[[], int]) -> ClockOffset | None:
    before = now_ns()
    try:
        theirs: int = handle.call("clock", timeout_s=_PING_TIMEOUT_S)
    except Exception as error:  # whatever keeps it from answering, others of its machine may
        log.warning("%s does not tell the time: %r", handle.name, error)
        return None
    after = now_ns()
    return ClockOffset(theirs - (before + after) // 2, (after - before + 1) // 2)
