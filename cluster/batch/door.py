"""Where rows wait while the gateway is away, so that none of them uses up its attempts on a cluster that is down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cluster.batch.backoff import Backoff, Sleep
from cluster.batch.patience import Patience


class Door:
    """Open until a row reports that the gateway is lost; then one of those that wait asks until it is back."""

    def __init__(self, probe: Callable[[], Awaitable[str]], patience: Patience, sleep: Sleep = asyncio.sleep) -> None:
        """``probe`` tells why the gateway cannot answer, or "" when it can."""
        self._probe = probe
        self._patience = patience
        self._sleep = sleep
        self._one = asyncio.Lock()
        self._open = True
        self._openings = 0

    async def enter(self) -> int:
        """Return when the gateway is there: which opening of the door this is. Raises OutOfPatience, and what
        ``probe`` raises."""
        async with self._one:
            backoff = Backoff()
            while not self._open:
                trouble = await self._probe()
                if trouble:
                    self._patience.trouble(trouble)
                    await self._sleep(backoff.next())
                else:
                    self._open = True
                    self._openings += 1
        return self._openings

    def lost(self, opening: int) -> None:
        """The gateway went away after ``opening``. Those who learn of it late do not close the door again."""
        if opening == self._openings:
            self._open = False
