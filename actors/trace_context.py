"""The trace that work belongs to, as it travels: a W3C ``traceparent`` of version 00, ``00-TRACE-SPAN-FLAGS``.

https://www.w3.org/TR/trace-context/ . A span is handed from function to function, never attached to a thread's current
context: a step serves requests of many traces.
"""

from __future__ import annotations

from opentelemetry.context import Context
from opentelemetry.trace import Span, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Trace = Context
"""Names a span in whose trace others can be started, as its children."""

_FIELD = "traceparent"
_CHARS = 55
_W3C = TraceContextTextMapPropagator()


def trace_from(traceparent: str) -> Trace:
    """Where to start a child of the span that ``traceparent`` names. Raises ValueError if it names none."""
    context = _W3C.extract({_FIELD: traceparent}, Context())
    if len(traceparent) != _CHARS or not get_current_span(context).get_span_context().is_valid:
        raise ValueError(
            f"traceparent is {traceparent[: 2 * _CHARS]!a}, must be 00-<32 hex>-<16 hex>-<2 hex>, no id all 0"
        )
    return context


def split_traceparent(traceparent: str) -> tuple[str, str]:
    """Trace id and span id, in hexadecimal. ValueError if ``traceparent`` is none."""
    parts = traceparent.split("-")
    if len(traceparent) != _CHARS or len(parts) != 4:
        raise ValueError(f"traceparent is {traceparent[: 2 * _CHARS]!a}, must be 00-<32 hex>-<16 hex>-<2 hex>")
    return parts[1], parts[2]


def traceparent_of(span: Span) -> str:
    """What names ``span`` elsewhere."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span, Context()))
    return carrier[_FIELD]
