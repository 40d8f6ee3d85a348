"""Telemetry that fails: nothing but a line in the log."""

from __future__ import annotations

import logging

import pytest

from actors.guard import Guard


def fail(guard: Guard, error: BaseException) -> bool:
    """True if whoever comes after the block goes on."""
    with guard:
        raise error
    return True


def test_an_error_is_told_at_most_twice_a_minute_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    guard = Guard("requests", lambda: now[0])
    for now[0] in (0.0, 1.0, 29.0, 31.0):
        assert fail(guard, KeyError("no such thing"))
    assert [entry.getMessage() for entry in caplog.records] == ["telemetry of requests fails; serving goes on"] * 2
    assert all(entry.levelno == logging.ERROR and entry.exc_info for entry in caplog.records)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit()])
def test_what_is_no_error_of_telemetry_passes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(Guard("requests"), error)
