"""For every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# Before anything loads torch: it says how OpenMP's threads wait (see there).
import actors  # noqa: F401

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


@pytest.fixture(scope="session")
def installed() -> InMemorySpanExporter:
    """The recorder of this process's spans: one, since a process has one provider of tracers for good."""
    from tests.span_recorder import install_recorder

    return install_recorder()


@pytest.fixture
def spans(installed: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """What is recorded in this test."""
    installed.clear()
    yield installed
    installed.clear()
