"""What leaves a process over OTLP/HTTP (protobuf): exporters of spans and metrics, and who they come from.

The configuration alone decides where to; the SDK's environment variables were taken out before (see ``process.py``).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource

from cluster.config import TelemetryConfig

_TIMEOUT_S = 5.0


def resource(actor: str) -> Resource:
    """Who the telemetry comes from: an actor by its name, ``serve`` or ``local``."""
    return Resource(
        {"service.name": "expertmesh", "service.version": version("expertmesh"), "service.instance.id": actor}
    )


def span_exporter(config: TelemetryConfig) -> OTLPSpanExporter:
    """To the configured collector."""
    return OTLPSpanExporter(endpoint=_url(config, "traces"), **_options(config))


def metric_exporter(config: TelemetryConfig) -> OTLPMetricExporter:
    """To the configured collector."""
    return OTLPMetricExporter(endpoint=_url(config, "metrics"), **_options(config))


def _url(config: TelemetryConfig, signal: str) -> str:
    return f"{config.otlp_endpoint.rstrip('/')}/v1/{signal}"


def _options(config: TelemetryConfig) -> dict[str, Any]:
    return {"headers": config.otlp_headers, "timeout": _TIMEOUT_S, "compression": Compression.Gzip}
