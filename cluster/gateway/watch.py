"""The cluster's events for everybody who watches: one question to the controller at a time, however many they are."""

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
        try:
            while True:
                for event in [e for e in self._events if e.sequence > after]:
                    after = event.sequence
                    yield event
                reader = self._running_reader()
                async with self._news:
                    while self._last() <= after and not reader.done():
                        await self._news.wait()
                if reader.done():
                    reader.result()
        finally:
            self._watchers -= 1

    def _running_reader(self) -> asyncio.Task[None]:
        """The reader outlives the last watcher by one question, which cannot be taken back: the next uses it again."""
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        return self._reader

    def _last(self) -> int:
        return self._events[-1].sequence if self._events else 0

    async def _read(self) -> None:
        """Ask, with patience, for what comes after the last event known, as long as somebody watches."""
        try:
            while self._watchers:
                call = self._controller.begin("events", self._last(), _POLL_S)
                for data in await asyncio.wrap_future(call):
                    self._events.append(ClusterEvent.FromString(data))
                async with self._news:
                    self._news.notify_all()
        finally:
            async with self._news:
                self._news.notify_all()

    def close(self) -> None:
        """The gateway ends."""
        if self._reader is not None:
            self._reader.cancel()
