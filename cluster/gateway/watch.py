"""The cluster's events for everybody who watches: one question to the controller at a time, whoever many they are."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from expertmesh.v1.control_pb2 import ClusterEvent

from cluster.events import REMEMBERED
from cluster.fleet import ActorHandle

_POLL_S = 20.0


class ClusterWatch:
    """Follows the controller's event log while somebody watches. Lives in the gateway's event loop."""

    def __init__(self, controller: ActorHandle) -> None:
        self._controller = controller
        self._events: deque[ClusterEvent] = deque(maxlen=REMEMBERED)
        self._news = asyncio.Condition()
        self._watchers = 0
        self._reader: asyncio.Task[None] | None = None

    async def follow(self, after: int) -> AsyncIterator[ClusterEvent]:
        """Events after this one, for ever. Raises ActorUnreachable when the controller is gone."""
        self._watchers += 1
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        reader = self._reader
        try:
            while True:
                for event in [e for e in self._events if e.sequence > after]:
                    after = event.sequence
                    yield event
                if reader.done():
                    reader.result()
                async with self._news:
                    while not reader.done() and self._last() <= after:
                        await self._news.wait()
        finally:
            self._watchers -= 1
            if not self._watchers:
                reader.cancel()

    def _last(self) -> int:
        return self._events[-1].sequence if self._events else 0

    async def _read(self) -> None:
        """Asks, with patience, for what comes after the last event known."""
        try:
            while True:
                call = self._controller.begin("events", self._last(), _POLL_S)
                for data in await asyncio.wrap_future(call):
                    self._events.append(ClusterEvent.FromString(data))
                async with self._news:
                    self._news.notify_all()
        except BaseException:
            async with self._news:
                self._news.notify_all()
            raise
