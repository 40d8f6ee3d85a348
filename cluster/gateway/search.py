"""How a stream that lost its attention shard looks for another: who was tried, when to try again, when to give up."""

from __future__ import annotations

import math
from collections.abc import Set

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class Search:
    """One stream's search since its last token. Pure: the time (seconds of one clock) is handed in.

    Sound shards that were not tried yet are tried at once. When there is none, one try follows after each pause, which
    is twice as long each time and ends early when such a shard appears; suspects and those tried before take turns.
    """

    def __init__(self, timeout_s: float) -> None:
        """``timeout_s``: how long a stream may be without a new token, from the first failure on."""
        self._timeout_s = timeout_s
        self._pause_s = _FIRST_PAUSE_S
        self.tried: set[str] = set()
        self.resume_at = -math.inf
        self.give_up_at = math.inf

    def failed(self, name: str) -> None:
        """The stream got no new token from this shard."""
        self.tried.add(name)

    def begin(self, now: float) -> None:
        """The stream needs a shard, again if it had one since its last token."""
        self.give_up_at = min(self.give_up_at, now + self._timeout_s)
        self.resume_at = now + self._pause_s

    def next_try(self, names: Set[str]) -> Set[str]:
        """The pause is over: whom of ``names`` to leave out now, which is those tried, unless all of them were."""
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if self.tried >= names:
            self.tried.clear()
        return self.tried
