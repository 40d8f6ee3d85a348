"""When what happened to each request on an attention shard. Times are handed in; nothing here looks at a clock."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from actors.engine.plan import StepPlan
from actors.engine.request import GenerationRequest, TokenEvent


class Instant(NamedTuple):
    """One moment by two clocks: ``wall_ns`` since the epoch stamps spans and compares between nodes as well as their
    clocks do; ``clock_s`` is monotonic, and durations are its differences."""

    wall_ns: int
    clock_s: float

    @classmethod
    def now(cls) -> Instant:
        """This moment."""
        return cls(time.time_ns(), time.monotonic())


@dataclass(slots=True)
class Timeline:
    """One request. ``scheduled``: when the step began that had its first tokens; ``first_token``: when the first one of
    this run was there; both None before. ``tokens`` were drawn in this run. ``preemptions``: how often it was sent back
    to the queue; what it waited then is part of the phase it was in."""

    request: GenerationRequest
    admitted: Instant
    scheduled: Instant | None = None
    first_token: Instant | None = None
    tokens: int = 0
    preemptions: int = 0

    def timed(self, event: TokenEvent) -> TokenEvent:
        """``event``, which was just noted; with the times of the phases before if it tells the first token."""
        if event.token is None or self.tokens != 1:
            return event
        assert self.scheduled is not None
        assert self.first_token is not None
        return replace(
            event,
            queue_s=self.scheduled.clock_s - self.admitted.clock_s,
            prefill_s=self.first_token.clock_s - self.scheduled.clock_s,
        )


class Timelines:
    """Those of the requests in the engine, from their admission to their end, whatever that is."""

    def __init__(self) -> None:
        self._by_id: dict[str, Timeline] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def admit(self, request: GenerationRequest, now: Instant) -> None:
        """The engine took a request."""
        self._by_id[request.request_id] = Timeline(request, now)

    def begin_step(self, plan: StepPlan, now: Instant) -> list[Timeline]:
        """A step begins. Returns those whose first it is."""
        for request_id in plan.preempted:
            self._by_id[request_id].preemptions += 1
        started = {c.request_id: t for c in plan.all_chunks if (t := self._by_id[c.request_id]).scheduled is None}
        for timeline in started.values():
            timeline.scheduled = now
        return [*started.values()]

    def note(self, events: Iterable[TokenEvent], now: Instant) -> list[tuple[TokenEvent, Timeline]]:
        """This was told at ``now``; each event comes back with its times, and with its request's timeline."""
        return [self._noted(event, now) for event in events]

    def _noted(self, event: TokenEvent, now: Instant) -> tuple[TokenEvent, Timeline]:
        timeline = self._by_id[event.request_id] if event.finish is None else self._by_id.pop(event.request_id)
        if event.token is not None:
            timeline.tokens += 1
            timeline.first_token = timeline.first_token or now
        return timeline.timed(event), timeline
