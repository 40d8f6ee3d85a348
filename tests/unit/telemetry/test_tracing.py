"""The last spans of a process. Each in a process of its own, that ends at once afterwards: a provider is for good."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult

from cluster.telemetry.tracing import _Delivery
from tests.otlp_collector import collecting

LAST_SPAN = """
import os, sys, time
from opentelemetry import trace
from cluster.config import TelemetryConfig
from cluster.telemetry.process import ProcessTelemetry
telemetry = ProcessTelemetry(TelemetryConfig(otlp_endpoint=sys.argv[1]), "expert-0")
trace.get_tracer("test").start_span("last").end()
began = time.monotonic()
telemetry.flush()
print(time.monotonic() - began, flush=True)
telemetry.flush()
os._exit(0)
"""


def flush_s(endpoint: str) -> float:
    """How long a process waits for its last span to be sent, in seconds."""
    command = [sys.executable, "-c", LAST_SPAN, endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Traceback" not in done.stderr
    return float(done.stdout)


def test_the_last_span_is_sent_before_the_process_ends(tmp_path: Path) -> None:
    with collecting(tmp_path / "otlp.jsonl") as collector:
        flush_s(collector.endpoint + "/")
        (span,) = collector.spans
    assert (span["name"], span["actor"]) == ("last", "expert-0")
    (export,) = collector.exports
    assert "service.version" in str(export["request"]["resourceSpans"][0]["resource"])


def test_a_collector_that_does_not_answer_is_waited_for_about_a_second() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert 0.9 < flush_s(f"http://127.0.0.1:{silent.getsockname()[1]}") < 4


def test_nor_is_one_that_is_not_there_for_longer() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert flush_s(f"http://127.0.0.1:{closed.getsockname()[1]}") < 4


def test_an_export_that_raises_has_failed() -> None:
    delivery = _Delivery(Mock(export=Mock(side_effect=[ValueError("broken"), SpanExportResult.SUCCESS])))
    with pytest.raises(ValueError, match="broken"):
        delivery.export(())
    assert delivery.failed
    assert delivery.export(()) is SpanExportResult.SUCCESS
    assert not delivery.failed
