"""Spans made in this process, in memory. A process gets one tracer provider for good, so all tests share it."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
PARENT_ID = 0xB7AD6B7169203331
TRACEPARENT = f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01"
"""A sampled trace, and a span in it to be the parent of what is tested."""


def install_recorder() -> InMemorySpanExporter:
    """Record what belongs to traces that came in sampled; nothing here starts one of its own."""
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF), shutdown_on_exit=False)
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def named(recorder: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """The ended spans of a name, by their start."""
    found = (span for span in recorder.get_finished_spans() if span.name == name)
    return sorted(found, key=lambda span: span.start_time or 0)


def parent_id(span: ReadableSpan) -> int:
    """The id of its parent."""
    assert span.parent is not None
    return span.parent.span_id


def span_id(span: ReadableSpan) -> int:
    """Its own id."""
    return span.context.span_id


def about(span: ReadableSpan, key: str) -> object:
    """The attribute ``expertmesh.<key>``, or None."""
    return (span.attributes or {}).get(f"expertmesh.{key}")
