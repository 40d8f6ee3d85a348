"""Telemetry of a process as a whole: its log, and the export of its spans."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.config import TelemetryConfig
from cluster.telemetry.logs import begin_logs

if TYPE_CHECKING:
    from cluster.telemetry.tracing import Tracing

log = logging.getLogger(__name__)


class ProcessTelemetry:
    """From the start of a process to ``end``. ``actor`` names it: an actor's name, ``serve`` or ``local``."""

    def __init__(self, config: TelemetryConfig, actor: str) -> None:
        self._undo_logs = begin_logs(config, actor)
        if ignored := _forget_environment():
            log.warning("not read: %s; telemetry is configured in the configuration file", ", ".join(ignored))
        self._tracing = _tracing(config, actor) if config.otlp_endpoint else None

    def flush(self) -> None:
        """Spans that are made from now on get lost; those that were made are sent. Idempotent."""
        if self._tracing is not None:
            self._tracing.end()

    def end(self) -> None:
        """Leave the process as it was, as far as that can be: for one that goes on afterwards."""
        self.flush()
        self._undo_logs()


def _forget_environment() -> list[str]:
    """Take the variables of OpenTelemetry's SDK out of the environment; returns their names.

    Those of the machine on which ``serve`` is typed are not those of the nodes on which actors run: a cluster would
    half follow them.
    """
    names = sorted(name for name in os.environ if name.startswith("OTEL_"))
    for name in names:
        del os.environ[name]
    return names


def _tracing(config: TelemetryConfig, actor: str) -> Tracing:
    from cluster.telemetry.tracing import Tracing  # takes a moment to import, in each actor's process

    return Tracing(config, actor)


@contextmanager
def process_telemetry(config: TelemetryConfig, actor: str) -> Iterator[None]:
    """For as long as a block lasts."""
    telemetry = ProcessTelemetry(config, actor)
    try:
        yield
    finally:
        telemetry.end()
