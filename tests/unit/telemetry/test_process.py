"""Telemetry of a process: what it reads, and an actor's last call."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from cluster.actor_class import ActorClass
from cluster.config import TelemetryConfig
from cluster.hosted import Hosted
from cluster.telemetry.process import ProcessTelemetry, process_telemetry


class Role:
    """An actor's object."""

    def __init__(self, name: str) -> None:
        self.name = name

    def hello(self, whom: str) -> str:
        """A call like others."""
        return f"{self.name} greets {whom}"

    def stop(self) -> None:
        """The last call; it fails."""
        raise RuntimeError("could not stop")


@pytest.fixture
def hosted() -> Iterator[Hosted]:
    """One in this process."""
    made = Hosted(TelemetryConfig(), "expert-0", ActorClass(__name__, "Role"), "expert-0")
    yield made
    made._telemetry.end()


def test_variables_of_the_environment_are_not_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere:4318")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with process_telemetry(TelemetryConfig(), "serve"):
        assert not [name for name in os.environ if name.startswith("OTEL_")]
    line = capsys.readouterr().err
    assert "OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SDK_DISABLED" in line
    assert "elsewhere" not in line


def test_a_process_logs_as_before_when_the_block_is_left() -> None:
    before = list(logging.getLogger().handlers)
    with process_telemetry(TelemetryConfig(), "serve"):
        assert len(logging.getLogger().handlers) == len(before) + 1
    assert logging.getLogger().handlers == before


def test_an_actor_logs_under_its_name(hosted: Hosted, capsys: pytest.CaptureFixture[str]) -> None:
    assert hosted.call("hello", "you") == "expert-0 greets you"
    logging.getLogger("actors.expert").warning("something happened")
    assert "warning expert-0 actors.expert: something happened" in capsys.readouterr().err


def test_spans_are_flushed_by_the_last_call_and_no_other(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[ProcessTelemetry] = []
    monkeypatch.setattr(ProcessTelemetry, "flush", lambda self: flushed.append(self))
    hosted.call("hello", "you")
    assert flushed == []
    with pytest.raises(RuntimeError, match="could not stop"):
        hosted.call("stop")
    assert flushed == [hosted._telemetry]
