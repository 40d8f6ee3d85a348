"""What comes for the answers of one request, in the order in which it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType

from actors.engine.request import TokenEvent
from cluster.gateway.group import StreamGroup
from cluster.gateway.stream import Stream
from cluster.gateway.streams import Streams

_News = tuple[int, list[TokenEvent]]


class Arrivals:
    """Reads all streams of a request at once, so that one which looks for a shard does not hold up the others.

    To be used in ``async with``: no task of it is left after that. A single stream is read without a task.
    """

    def __init__(self, streams: Streams, group: StreamGroup) -> None:
        self._streams = streams
        self._group = group
        self._news: asyncio.Queue[_News | Exception] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Arrivals:
        if len(self._group.streams) > 1:
            self._readers = [asyncio.create_task(self._read(stream)) for stream in self._group.streams]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def next(self) -> tuple[int, Sequence[TokenEvent]]:
        """A choice and at least one event of it. Raises what ``Streams.next_events`` does, for any choice."""
        if not self._readers:
            return 0, await self._streams.next_events(self._group.streams[0])
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        return news

    def stop(self, choice: int) -> None:
        """No more of this choice is wanted."""
        if self._readers:
            self._readers[choice].cancel()
        self._streams.stop(self._group.streams[choice])

    async def _read(self, stream: Stream) -> None:
        """One stream to its end."""
        try:
            events: list[TokenEvent] = []
            while not events or events[-1].finish is None:
                events = await self._streams.next_events(stream)
                self._news.put_nowait((stream.choice, events))
        except Exception as error:
            self._news.put_nowait(error)
