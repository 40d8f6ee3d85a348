"""Spans of requests on an attention shard, for those that came with a trace.

Under the gateway's span: ``queue``, ``prefill``, ``decode``, as far as a request came; the last one tells how it ended.
Under one request's ``decode`` now and then a ``step``, under which router and expert shards put theirs (see
``actors.batch_spans``). No span holds anything of a prompt or an answer but how many tokens it has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from opentelemetry.context import Context
from opentelemetry.trace import (
    Span,
    Status,
    StatusCode,
    format_trace_id,
    get_current_span,
    get_tracer,
    set_span_in_context,
)

from actors.engine.plan import StepPlan
from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.timeline import Instant, Timeline
from actors.trace_context import Trace, trace_from, traceparent_of

log = logging.getLogger(__name__)

_TRACER = get_tracer("expertmesh.actors")

BETWEEN_STEPS_S = 1.0
"""Seconds between two traced steps of a shard, at least: one makes up to 16 spans in each expert shard."""

_FAILURES = (FinishReason.ERROR, FinishReason.UNAVAILABLE)


class StepSpan:
    """One step that is traced, for the request that it belongs to; made by :meth:`RequestSpans.step`."""

    def __init__(self, span: Span, request_id: str) -> None:
        self.traceparent = traceparent_of(span)
        self._span = span
        self._request_id = request_id

    def end(self, now: Instant, events: Iterable[TokenEvent], waited_s: float) -> None:
        """The step has brought ``events``; for ``waited_s`` seconds of it only experts were waited for."""
        self._span.set_attribute("expertmesh.experts_wait_s", waited_s)
        for event in events:
            if event.request_id == self._request_id and event.finish is not None:
                _tell_failure(self._span, event.finish)
        self._span.end(now.wall_ns)


class RequestSpans:
    """Those of one attention shard, ``actor``. Nothing is kept of requests without a trace."""

    def __init__(self, actor: str) -> None:
        self._actor = actor
        self._parents: dict[str, Trace] = {}  # of all traced requests, by id
        self._decodes: dict[str, Span] = {}  # of those with a token
        self._stepless: dict[str, Span] = {}  # of those of which no step was traced yet
        self._next_step_s = 0.0

    def __len__(self) -> int:
        return len(self._parents)

    def admit(self, request: GenerationRequest) -> None:
        """The engine took a request."""
        if not request.traceparent:
            return
        try:
            self._parents[request.request_id] = trace_from(request.traceparent)
        except ValueError as error:  # a trace that cannot be read shall not cost an answer
            log.warning("request %s is not traced: %s", request.request_id, error)

    def trace_ids(self, request_ids: Iterable[str]) -> list[str]:
        """Of those that are traced; each once, in hexadecimal."""
        spans = (get_current_span(self._parents[name]) for name in request_ids if name in self._parents)
        return list(dict.fromkeys(format_trace_id(span.get_span_context().trace_id) for span in spans))

    def begin_step(self, plan: StepPlan, started: Iterable[Timeline], now: Instant, number: int) -> StepSpan | None:
        """Step ``number`` begins, the first one of the requests ``started``.

        Returns its span if it is traced: the first that draws a further token of a traced request, once another one is
        long enough ago. Each request has at most one.
        """
        for timeline in started:
            if timeline.request.request_id in self._parents:
                self._phase("queue", timeline, timeline.admitted).end(now.wall_ns)
        if not self._stepless or now.clock_s < self._next_step_s:
            return None
        request_id = next((chunk.request_id for chunk in plan.sampled if chunk.request_id in self._stepless), None)
        if request_id is None or not self._stepless[request_id].is_recording():
            return None
        self._next_step_s = now.clock_s + BETWEEN_STEPS_S
        decode = set_span_in_context(self._stepless.pop(request_id), Context())
        about: dict[str, str | int] = {
            "expertmesh.actor": self._actor,
            "expertmesh.step": number,
            "expertmesh.rows": sum(len(chunk.token_ids) for chunk in plan.all_chunks),
            "expertmesh.requests": len(plan.all_chunks),
        }
        return StepSpan(_TRACER.start_span("step", decode, attributes=about, start_time=now.wall_ns), request_id)

    def note(self, news: Iterable[tuple[TokenEvent, Timeline]], now: Instant) -> None:
        """This was told at ``now``."""
        if not self._parents:
            return
        for event, timeline in news:
            if event.request_id in self._parents:
                self._note(event, timeline, now)

    def _note(self, event: TokenEvent, timeline: Timeline, now: Instant) -> None:
        request_id = event.request_id
        if event.token is not None and request_id not in self._decodes:
            self._prefill(timeline).end(now.wall_ns)
            self._decodes[request_id] = self._stepless[request_id] = self._phase("decode", timeline, now)
        if event.finish is None:
            return
        self._stepless.pop(request_id, None)
        last = self._decodes.pop(request_id, None)
        if last is not None:
            last.set_attribute("expertmesh.output_tokens", timeline.tokens)
        elif timeline.scheduled is not None:
            last = self._prefill(timeline)
        else:
            last = self._phase("queue", timeline, timeline.admitted)
        last.set_attribute("expertmesh.finish_reason", event.finish.value)
        last.set_attribute("expertmesh.preemptions", timeline.preemptions)
        _tell_failure(last, event.finish)
        last.end(now.wall_ns)
        del self._parents[request_id]

    def _prefill(self, timeline: Timeline) -> Span:
        assert timeline.scheduled is not None
        span = self._phase("prefill", timeline, timeline.scheduled)
        tokens = len(timeline.request.prompt_ids) + len(timeline.request.generated_ids)
        span.set_attribute("expertmesh.prompt_tokens", tokens)
        return span

    def _phase(self, name: str, timeline: Timeline, began: Instant) -> Span:
        request = timeline.request
        about: dict[str, str | int] = {"expertmesh.actor": self._actor, "expertmesh.choice": request.sampling.choice}
        return _TRACER.start_span(name, self._parents[request.request_id], attributes=about, start_time=began.wall_ns)


def _tell_failure(span: Span, finish: FinishReason) -> None:
    if finish in _FAILURES:
        span.set_attribute("error.type", finish.value)
        span.set_status(Status(StatusCode.ERROR, finish.value))
