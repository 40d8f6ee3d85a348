"""Who observes the requests of a gateway, whichever door they come through."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from expertmesh.v1 import inference_pb2 as pb
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from actors.guard import Guard
from cluster.telemetry.observed import ObservedRequest, door_attributes
from cluster.telemetry.request_metrics import RequestMetrics

OTHER_MODEL = "other"

_PROVIDER = "expertmesh"
_SHOWN_NAME_CHARS = 100
_TRACEPARENT = "traceparent"

_tracer = trace.get_tracer("expertmesh.gateway")
_propagator = TraceContextTextMapPropagator()


class RequestObserver:
    """Observes the requests of one gateway. ``clock`` in seconds. Whatever fails in observing them is logged, and the
    request goes on."""

    def __init__(
        self,
        model: str,
        metrics: RequestMetrics,
        tracer: Tracer = _tracer,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock
        self._guard = Guard("requests")

    def begin(
        self, request: pb.GenerateRequest, door: str, operation: str, tenant: str, trace_headers: Mapping[str, str]
    ) -> ObservedRequest:
        """A request has come through a door; it is observed for as long as the block lasts that it is used for.

        ``trace_headers``: the client's W3C trace context; a ``traceparent`` that is malformed counts as none. A
        ``tracestate`` is not read: nothing behind this gateway would get it.
        """
        known = request.model in ("", self._model)
        labels = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": self._model if known else OTHER_MODEL,
        }
        span: Span = INVALID_SPAN
        with self._guard:
            span = self._tracer.start_span(
                f"{operation} {self._model if known else OTHER_MODEL}",
                _parent(trace_headers),
                SpanKind.SERVER,
                {
                    **labels,
                    **({} if known else {"gen_ai.request.model": request.model[:_SHOWN_NAME_CHARS]}),
                    **({"expertmesh.tenant": tenant} if tenant else {}),
                    **door_attributes(door, operation),
                },
            )
        return ObservedRequest(self._metrics, span, door, tenant, labels, self._clock, self._guard)


def _parent(trace_headers: Mapping[str, str]) -> Context:
    """The client's span, if it names one."""
    return _propagator.extract({_TRACEPARENT: trace_headers.get(_TRACEPARENT, "")}, Context())
