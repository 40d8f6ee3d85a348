"""One open stream: an answer to a request, the log of its tokens, and the run on an attention shard that goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.refusals import Refusal
from cluster.access import Caller
from cluster.gateway.errors import ServiceError
from cluster.gateway.peers import AttentionPeer
from cluster.gateway.search import Search
from cluster.gateway.validation import ValidRequest

_MOST_EVENTS = 64
"""For one message: of thousands with log-probabilities it would hold other streams up, and be too large for clients."""


@dataclass(frozen=True)
class Watch:
    """Whoever observes a request: its trace context (W3C) or "", and who is told of each choice's events as they come.
    ``arrived`` raises nothing: it is called in the middle of a step's events for all streams."""

    traceparent: str
    arrived: Callable[[TokenEvent, int], None]


UNWATCHED = Watch("", lambda event, choice: None)


@dataclass(eq=False)
class Run:
    """A stream on a shard, from its submission on. ``engine_id`` is unique in the cluster and never used again, so
    that what an earlier run still sends reaches nobody."""

    engine_id: str
    stream: Stream
    peer: AttentionPeer
    admission: Future[Refusal | None]
    """Of all streams that were submitted together."""
    over: asyncio.Future[None]
    """Done when the stream has left this run, whatever the shard may still say."""


class Stream:
    """One answer to a request that was let in. It outlives its runs: ``log`` has every token that any of them gave, by
    index.

    ``choice`` numbers the answers of ``request``, from 0. ``deadline`` is the client's in event-loop time (seconds),
    infinite without one. ``watch`` is told of every event.
    """

    def __init__(
        self, caller: Caller, request: ValidRequest, choice: int, deadline: float, recovery_s: float, watch: Watch
    ) -> None:
        self.caller = caller
        self.watch = watch
        self.request = request
        self.choice = choice
        self.deadline = deadline
        self.log: list[int] = []
        self.run: Run | None = None
        self.runs = 0
        self.admitted = False
        self.doubtful = False  # a shard that is lost may have admitted it
        self.ended = False
        self.error: ServiceError | None = None  # why it ended, if no shard told its end
        self._recovery_s = recovery_s
        self.search = Search(recovery_s)
        self._events: list[TokenEvent] = []
        self._news = asyncio.Event()

    @property
    def adrift(self) -> bool:
        """True while no shard works on it and its end is not known."""
        return self.run is None and not self.ended

    @property
    def has_news(self) -> bool:
        """True if ``take`` would give something."""
        return bool(self._events)

    @property
    def complete(self) -> FinishReason | None:
        """Why the log already is the whole answer, or None. As ``actors.engine.sequence``, which is not to be asked
        for more then; the context's length is no other case, since the validator keeps max_tokens within it."""
        if self.log and self.log[-1] in self.request.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.log) >= self.request.max_tokens else None

    def job(self, engine_id: str, gateway: str, now: float, leader: str = "") -> GenerationRequest:
        """What a shard is asked for: the tokens that come after the log.

        The log-probabilities of the prompt come with the first token of the first choice, and of that alone: whoever
        wants them has its whole prompt computed.
        """
        request, first = self.request, self.choice == 0 and not self.log
        return GenerationRequest(
            request_id=engine_id,
            prompt_ids=request.prompt_ids,
            sampling=replace(request.sampling, choice=self.choice),
            max_tokens=request.max_tokens,
            stop_ids=request.stop_ids,
            timeout_s=None if self.deadline == math.inf else self.deadline - now,
            gateway=gateway,
            generated_ids=tuple(self.log),
            replay=self.admitted or self.doubtful,
            traceparent=self.watch.traceparent,
            priority=request.priority,
            tenant=self.caller.tenant,
            share=self.caller.share,
            leader=leader,
            prompt_logprobs=request.prompt_logprobs if first else None,
        )

    def push(self, event: TokenEvent) -> None:
        """An event for the call; with its token, if it has one, the log grows and the search for a shard is over.

        Who watches is told last: the token is the client's by then, whatever happens there.
        """
        if event.token is not None:
            self.log.append(event.token)
            self.search = Search(self._recovery_s)
        self.ended = self.ended or event.finish is not None
        self._events.append(event)
        self.wake()
        self.watch.arrived(event, self.choice)

    def fail(self, error: ServiceError) -> None:
        """It ends here: the call that waits gets ``error``, after the tokens that are there."""
        self.ended, self.error = True, error
        self.wake()

    def take(self) -> list[TokenEvent]:
        """What came since the last time, or the first of it where a slow reader let much come together."""
        events, self._events = self._events[:_MOST_EVENTS], self._events[_MOST_EVENTS:]
        return events

    def wake(self) -> None:
        """Let ``wait`` return: there is an event, or the run is over."""
        self._news.set()

    async def wait(self) -> None:
        """Return when there was a ``wake`` since the last time. One call waits at a time."""
        await self._news.wait()
        self._news.clear()
