"""For every test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# Before anything loads torch: it says how OpenMP's threads wait (see there).
import actors  # noqa: F401

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


def pytest_configure() -> None:
    """Ctrl-C is tested, here and in child processes: a shell that starts tests in the background has them ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
