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
from cluster.gateway.call import Call
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

    def begin(self, request: pb.GenerateRequest, request_id: str, call: Call) -> ObservedRequest:
        """A request has come through a door; it is observed for as long as the block lasts that it is used for.

        ``request_id``: how its records name it. A ``traceparent`` of the client's that is malformed counts as none; a
        ``tracestate`` is not read: nothing behind this gateway would get it.
        """
        known = request.model in ("", self._model)
        labels = {
            "gen_ai.operation.name": call.operation,
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": self._model if known else OTHER_MODEL,
        }
        span: Span = INVALID_SPAN
        with self._guard:
            span = self._tracer.start_span(
                f"{call.operation} {self._model if known else OTHER_MODEL}",
                _parent(call.trace),
                SpanKind.SERVER,
                {
                    **labels,
                    **({} if known else {"gen_ai.request.model": request.model[:_SHOWN_NAME_CHARS]}),
                    **({"expertmesh.tenant": call.caller.tenant} if call.caller.tenant else {}),
                    **door_attributes(call.door, call.operation),
                },
            )
        return ObservedRequest(self._metrics, span, request_id, call, labels, self._clock, self._guard)


def _parent(trace_headers: Mapping[str, str]) -> Context:
    """The client's span, if it names one."""
    return _propagator.extract({_TRACEPARENT: trace_headers.get(_TRACEPARENT, "")}, Context())
