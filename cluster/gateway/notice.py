"""A word to everybody who waits for something to change."""

from __future__ import annotations

import asyncio
import contextlib
import math


class Notice:
    """``give`` wakes all who are in ``wait`` then. All calls come from one event loop.

    Between looking at what one waits for and ``wait`` there must be no other await: then no notice is missed.
    """

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def give(self) -> None:
        """Wake everybody who waits now."""
        self._next.set()
        # A new one, not clear(): whoever was woken must not have to run before the next waiter comes.
        self._next = asyncio.Event()

    async def wait(self, until: float = math.inf) -> None:
        """Return at the next notice, or at ``until`` (event-loop time in seconds)."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(None if until == math.inf else until):
                await self._next.wait()
