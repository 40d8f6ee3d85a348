"""What an attention shard lets others know of its work: times of requests, and spans of those that are traced.

The shard tells what happens, here alone. Whatever fails in here is logged and ends nothing (see ``actors.guard``).
"""

from __future__ import annotations

from collections.abc import Iterable

from actors.engine.plan import StepPlan
from actors.engine.request import GenerationRequest, TokenEvent
from actors.guard import Guard
from actors.request_spans import RequestSpans, StepSpan
from actors.timeline import Instant, Timeline, Timelines


class ShardObserver:
    """That of the attention shard ``actor``. ``admit`` from any thread, under the lock that guards the engine; the rest
    in the thread of the steps."""

    def __init__(self, actor: str) -> None:
        self._timelines = Timelines()
        self._spans = RequestSpans(actor)
        self._guard = Guard(f"attention shard {actor}")

    def __len__(self) -> int:
        return len(self._timelines) + len(self._spans)

    def admit(self, request: GenerationRequest, now: Instant) -> None:
        """The engine took a request."""
        with self._guard:
            self._timelines.admit(request, now)
            self._spans.admit(request)

    def begin_step(self, plan: StepPlan, now: Instant, number: int) -> StepSpan | None:
        """Step ``number`` begins. Returns its span if it is traced."""
        with self._guard:
            return self._spans.begin_step(plan, self._timelines.begin_step(plan, now), now, number)
        return None

    def end_step(self, span: StepSpan | None, now: Instant, events: Iterable[TokenEvent], waited_s: float) -> None:
        """The step of ``span`` has brought ``events``; for ``waited_s`` seconds of it only experts were waited for."""
        if span is not None:
            with self._guard:
                span.end(now, events, waited_s)

    def note(self, events: Iterable[TokenEvent], now: Instant) -> list[TokenEvent]:
        """These became known at ``now``; they come back with their times."""
        return [self._noted(event, now) for event in events]

    def trace_ids(self, plan: StepPlan) -> list[str]:
        """Of the requests in a step that are traced, for the log."""
        with self._guard:
            return self._spans.trace_ids(chunk.request_id for chunk in plan.all_chunks)
        return []

    def _noted(self, event: TokenEvent, now: Instant) -> TokenEvent:
        """Each on its own: one that fails must not cost the others their times, and their ends."""
        news: list[tuple[TokenEvent, Timeline]] = []
        with self._guard:
            news = self._timelines.note((event,), now)
        with self._guard:
            self._spans.note(news, now)
        return news[0][0] if news else event
