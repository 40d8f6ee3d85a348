"""One request as its gateway observes it: a span, metrics, and a line in the access log; never a word of its text.

The span is handed on explicitly and never made the current one: its request is carried out in an async generator, in
whose caller's context a current span would be left behind at each ``yield``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import grpc
from expertmesh.v1 import inference_pb2 as pb
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from actors.engine.request import TokenEvent
from cluster.gateway.errors import Internal
from cluster.gateway.status import status_code
from cluster.gateway.validation import ValidRequest
from cluster.telemetry.logs import fields
from cluster.telemetry.request_metrics import RequestMetrics

OTHER_MODEL = "other"
UNSAMPLED = ""

_PROVIDER = "expertmesh"
_GENERATE = "expertmesh.v1.Inference/Generate"
_ROUTES = {"chat": "/v1/chat/completions", "text_completion": "/v1/completions"}
_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
_SHOWN_NAME_CHARS = 100

_access = logging.getLogger("expertmesh.access")
_tracer = trace.get_tracer("expertmesh.gateway")
_propagator = TraceContextTextMapPropagator()


class RequestObserver:
    """Observes the requests of one gateway. ``clock`` in seconds."""

    def __init__(
        self,
        model: str,
        metrics: RequestMetrics,
        tracer: Tracer = _tracer,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.metrics = metrics
        self._tracer = tracer
        self.clock = clock

    def begin(
        self, request: pb.GenerateRequest, door: str, operation: str, tenant: str, trace_headers: Mapping[str, str]
    ) -> ObservedRequest:
        """A request has come through a door; it is observed for as long as the block lasts that it is used for.

        ``trace_headers``: the client's W3C trace context; one that is malformed counts as none.
        """
        known = request.model in ("", self.model)
        span = self._tracer.start_span(
            f"{operation} {self.model if known else OTHER_MODEL}",
            _propagator.extract(trace_headers),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": _PROVIDER,
                "gen_ai.request.model": self.model if known else request.model[:_SHOWN_NAME_CHARS],
                **({"expertmesh.tenant": tenant} if tenant else {}),
                **_door_attributes(door, operation),
            },
        )
        labels = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": self.model if known else OTHER_MODEL,
        }
        return ObservedRequest(self, span, door, tenant, labels)


class ObservedRequest:
    """From a request's arrival to its end: ``with`` ends it, by whatever ends the block."""

    def __init__(
        self, observer: RequestObserver, span: Span, door: str, tenant: str, labels: Mapping[str, str]
    ) -> None:
        self._metrics = observer.metrics
        self._clock = observer.clock
        self._span = span
        self._door = door
        self._tenant = tenant
        self._labels = dict(labels)
        self._began = observer.clock()
        self._first: float | None = None
        self._last = self._began
        self._tokens = 0
        self._request: ValidRequest | None = None
        self._finished: pb.Finished | None = None

    def __enter__(self) -> ObservedRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        now = self._clock()
        if error is None:
            code, outcome = grpc.StatusCode.OK, self._reason
        else:
            code, outcome = _ending(error)
        self._measure(now, "" if error is None else outcome, outcome)
        self._measure_call(now - self._began, code)
        self._log(now, error is not None, outcome)
        self._end_span(error, outcome, code)

    @property
    def traceparent(self) -> str:
        """W3C trace context for whoever works on it, if its trace is recorded; else empty."""
        if not self._span.is_recording():
            return UNSAMPLED
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(self._span))
        return carrier["traceparent"]

    def validated(self, request: ValidRequest) -> None:
        """It can be served, and as what."""
        self._request = request
        sampling = request.sampling
        self._span.set_attributes(
            {
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                "gen_ai.request.max_tokens": request.max_tokens,
                "gen_ai.response.id": request.request_id,
                "gen_ai.usage.input_tokens": len(request.prompt_ids),
                # a trace's integers are signed
                "gen_ai.request.seed": sampling.seed if sampling.seed < 2**63 else str(sampling.seed),
            }
        )
        self._metrics.prompt_tokens.add(len(request.prompt_ids), self._labels)

    def arrived(self, event: TokenEvent) -> None:
        """An attention shard has sent this, whether or not the client is ready to take it."""
        if event.queue_s is not None:
            self._metrics.queue.record(event.queue_s, self._labels)
        if event.prefill_s is not None:
            self._metrics.prefill.record(event.prefill_s, self._labels)
        if event.token is None:
            return
        now = self._clock()
        if self._first is None:
            self._first = now
            self._span.add_event("first_token")
            self._metrics.first_token.record(now - self._began, self._labels)
        else:
            self._metrics.between_tokens.record(now - self._last, self._labels)
        self._last = now
        self._tokens += 1

    def sent(self, message: pb.GenerateResponse) -> None:
        """The client gets this."""
        if message.HasField("finished"):
            self._finished = message.finished

    @property
    def _reason(self) -> str:
        return _REASONS[self._finished.reason] if self._finished is not None else "none"

    @property
    def _output_tokens(self) -> int:
        return self._tokens if self._finished is None else self._finished.usage.completion_tokens

    def _measure(self, now: float, error: str, outcome: str) -> None:
        metrics, labels, tokens = self._metrics, self._labels, self._output_tokens
        metrics.duration.record(now - self._began, {**labels, **({"error.type": error} if error else {})})
        metrics.finished.add(1, {"door": self._door, "operation": labels["gen_ai.operation.name"], "reason": outcome})
        metrics.generated_tokens.add(self._tokens, labels)
        if self._request is not None:
            prompt = len(self._request.prompt_ids)
            metrics.usage.record(prompt, {**labels, "gen_ai.token.type": "input"})
            metrics.usage.record(tokens, {**labels, "gen_ai.token.type": "output"})
        if self._first is not None:
            metrics.decode.record(now - self._first, labels)
            if self._tokens > 1:
                metrics.output_token.record((self._last - self._first) / (self._tokens - 1), labels)

    def _measure_call(self, duration_s: float, code: grpc.StatusCode) -> None:
        """For HTTP that is the door's own business: only it knows what status it sent."""
        if self._door == "grpc":
            attributes = {**_door_attributes(self._door, ""), "rpc.response.status_code": code.name}
            self._metrics.rpc.record(duration_s, attributes)

    def _log(self, now: float, failed: bool, outcome: str) -> None:
        context, request = self._span.get_span_context(), self._request
        _access.info(
            "request",
            extra=fields(
                request_id=request.request_id if request is not None else None,
                door=self._door,
                operation=self._labels["gen_ai.operation.name"],
                tenant=self._tenant or None,
                model=self._labels["gen_ai.request.model"],
                prompt_tokens=len(request.prompt_ids) if request is not None else None,
                completion_tokens=self._output_tokens,
                **{"error" if failed else "finish_reason": outcome},
                ttft_s=None if self._first is None else round(self._first - self._began, 6),
                duration_s=round(now - self._began, 6),
                trace_id=trace.format_trace_id(context.trace_id) if context.is_valid else None,
                span_id=trace.format_span_id(context.span_id) if context.is_valid else None,
            ),
        )

    def _end_span(self, error: BaseException | None, outcome: str, code: grpc.StatusCode) -> None:
        span = self._span
        span.set_attribute("gen_ai.usage.output_tokens", self._output_tokens)
        if self._door == "grpc":
            span.set_attribute("rpc.response.status_code", code.name)
        if error is None:
            span.set_attribute("gen_ai.response.model", self._labels["gen_ai.request.model"])
            span.set_attribute("gen_ai.response.finish_reasons", [outcome])
        else:
            span.set_attribute("error.type", outcome)
            if isinstance(error, Internal):
                span.set_attribute("expertmesh.error.reference", error.reference)
            # not the error's text: that of a bug may quote anything
            span.set_status(Status(StatusCode.ERROR, outcome))
        span.end()


def _ending(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Status and kind of what ended a request. Whoever is not interested any more closes the generator, or cancels."""
    if not isinstance(error, Exception):
        return grpc.StatusCode.CANCELLED, "cancelled"
    code = status_code(error)
    return code, code.name.lower()


def _door_attributes(door: str, operation: str) -> dict[str, Any]:
    if door == "grpc":
        return {"rpc.system.name": "grpc", "rpc.method": _GENERATE}
    return {"http.request.method": "POST", "http.route": _ROUTES[operation]}
