"""Fixtures of the actors' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.span_recorder import install_recorder


@pytest.fixture(scope="session")
def installed() -> InMemorySpanExporter:
    """The recorder of this process's spans."""
    return install_recorder()


@pytest.fixture
def spans(installed: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """What is recorded in this test."""
    installed.clear()
    yield installed
    installed.clear()
