"""The spans of one process, on their way to the collector."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from cluster.config import TelemetryConfig
from cluster.telemetry.otlp import resource, span_exporter

_QUEUE = 4096
_BATCH = 512
_DELAY_MS = 1000
_END_S = 1.0
_GIVE_UP_S = 0.1


class Tracing:
    """Export of this process's spans, from now until ``end``. One per process: OpenTelemetry's provider is global.

    What cannot be sent is dropped: the queue is bounded, and nobody ever waits for the collector.
    """

    def __init__(self, config: TelemetryConfig, actor: str) -> None:
        self._delivery = _Delivery(span_exporter(config))
        self._processor = BatchSpanProcessor(
            self._delivery,
            max_queue_size=_QUEUE,
            schedule_delay_millis=_DELAY_MS,
            max_export_batch_size=_BATCH,
            export_timeout_millis=_DELAY_MS,
        )
        sampler = ParentBased(TraceIdRatioBased(config.trace_ratio))
        provider = TracerProvider(sampler=sampler, resource=resource(actor), shutdown_on_exit=False)
        provider.add_span_processor(self._processor)
        trace.set_tracer_provider(provider)

    def end(self) -> None:
        """Send what is left, within about a second; to a collector that failed the last time nothing more is sent.
        Idempotent."""
        failed = self._delivery.failed
        if failed:
            self._delivery.shutdown()
        # its own patience cannot be set
        ending = threading.Thread(target=self._processor.shutdown, name="spans-end", daemon=True)
        ending.start()
        ending.join(_GIVE_UP_S if failed else _END_S)
        if ending.is_alive():
            self._delivery.shutdown()  # ends the pause before a retry
            ending.join(_GIVE_UP_S)


class _Delivery(SpanExporter):
    """An exporter that remembers whether its last try came to nothing."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._ended = False
        self.failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See SpanExporter."""
        if self._ended:
            return SpanExportResult.FAILURE
        self.failed = True  # unless it turns out otherwise: it may also raise
        result = self._exporter.export(spans)
        self.failed = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        """See SpanExporter. Idempotent."""
        if not self._ended:
            self._ended = True
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is held back here."""
        return True
