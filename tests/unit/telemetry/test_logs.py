"""Lines of the log: what is in them, and what nobody can put there."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from actors.log_fields import fields, mark
from cluster.config import TelemetryConfig
from cluster.telemetry.logs import Seldom, begin_logs, formatter

HEAD = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (debug|info|warning|error) +\S+ \S+: ")


def record(message: str, *args: Any, name: str = "cluster.test", **extra: Any) -> logging.LogRecord:
    """As a logger makes it."""
    return logging.getLogger(name).makeRecord(name, logging.WARNING, __file__, 1, message, args, None, extra=extra)


def failed(error: Exception) -> logging.LogRecord:
    """A record with a traceback."""
    try:
        secret = "PROMPT-MARKER"
        assert secret
        raise error
    except Exception:
        return logging.getLogger("x").makeRecord("x", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info())


def as_json(entry: logging.LogRecord) -> dict[str, Any]:
    """The one line, parsed."""
    line = formatter("json", "expert-3").format(entry)
    assert "\n" not in line
    parsed = json.loads(line)
    assert isinstance(parsed, dict)
    return parsed


def test_json_has_the_same_fields_on_every_line() -> None:
    parsed = as_json(record("lost %s", "wire", **fields(shard="a", rows=3, nothing=None)))

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", parsed.pop("timestamp"))
    assert parsed == {
        "level": "warning",
        "logger": "cluster.test",
        "event": "lost wire",
        "actor": "expert-3",
        "shard": "a",
        "rows": 3,
    }


def test_a_field_cannot_take_the_place_of_the_lines_own() -> None:
    parsed = as_json(record("event", **fields(actor="other", level="debug", logger="other", timestamp="never")))
    assert (parsed["actor"], parsed["level"], parsed["logger"]) == ("expert-3", "warning", "cluster.test")
    assert parsed["timestamp"] != "never"


def test_text_is_one_line_with_what_is_special_in_quotes() -> None:
    line = formatter("text", "expert-3").format(record("lost %s", "wire", **fields(shard="a-1", note='two "words"')))
    assert HEAD.match(line)
    assert line.endswith(r'warning expert-3 cluster.test: lost wire shard=a-1 note="two \"words\""')


@pytest.mark.parametrize("newline", ["\n", "\r", "\r\n", "\x0b", "\x85", "\u2028", "\x1b[2J"])
def test_no_text_of_a_client_makes_a_line_of_its_own(newline: str) -> None:
    forged = f"x{newline}2026-01-01T00:00:00.000000Z error gateway-0 root: forged"
    entry = record("refused %s", forged, **fields(model=forged))

    line = formatter("text", "gateway-0").format(entry)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert len(formatter("json", "gateway-0").format(entry).splitlines()) == 1


def test_lines_of_a_traceback_cannot_be_taken_for_records() -> None:
    entry = failed(ValueError("bad\n2026-01-01T00:00:00.000000Z error gateway-0 root: forged"))
    first, *rest = formatter("text", "gateway-0").format(entry).splitlines()
    assert HEAD.match(first)
    assert len(rest) > 3
    assert all(line.startswith("    ") for line in rest)


def test_a_traceback_tells_no_values_of_variables() -> None:
    assert "PROMPT-MARKER" not in formatter("text", "a").format(failed(ValueError("bad"))).replace(
        'secret = "PROMPT-MARKER"', ""
    )
    assert "ValueError: bad" in as_json(failed(ValueError("bad")))["exception"]


def test_a_line_says_to_which_request_its_error_belongs() -> None:
    cause, error = KeyError("why"), ValueError("bad")
    mark(cause, request_id="r-1", trace_id="ab" * 16)
    error.__cause__ = cause

    parsed = as_json(failed(error))
    assert (parsed["request_id"], parsed["trace_id"]) == ("r-1", "ab" * 16)
    assert "request_id=r-1" in formatter("text", "a").format(failed(error)).splitlines()[0]
    assert "trace_id" not in as_json(failed(ValueError("another")))


def noisy(message: str, line: int = 1, error: Exception | None = None, level: int = logging.ERROR) -> logging.LogRecord:
    """Of somebody else's package, from this line."""
    raised = (type(error), error, error.__traceback__) if error is not None else None
    return logging.getLogger("uvicorn.error").makeRecord("uvicorn.error", level, "there.py", line, message, (), raised)


def raised_here(error: Exception) -> Exception:
    """With a traceback that ends here."""
    try:
        raise error
    except Exception as caught:
        return caught


def raised_there(error: Exception) -> Exception:
    """With one that ends elsewhere."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_messages_of_other_packages_are_not_repeated_over_and_over() -> None:
    now = [0.0]
    seldom = Seldom(lambda: now[0])
    passed = []
    for now[0] in (0.0, 1.0, 29.0, 31.0):
        passed.append(seldom.filter(noisy(f"fatal error on <Transport at 0x7f{now[0]}>")))
        assert seldom.filter(record("ours"))
    assert passed == [True, False, False, True]
    assert seldom.filter(noisy("something else", line=2))
    assert seldom.filter(noisy("something worse", level=logging.CRITICAL))


def test_different_errors_told_at_one_place_do_not_hide_each_other() -> None:
    seldom = Seldom(lambda: 0.0)
    errors = [raised_here(KeyError("a")), raised_here(ValueError("a")), raised_there(ValueError("a"))]
    assert [seldom.filter(noisy("exception in application", error=error)) for error in errors] == [True] * 3
    again = [raised_here(KeyError("b")), raised_there(ValueError("b"))]
    assert [seldom.filter(noisy("exception in application", error=error)) for error in again] == [False] * 2


def test_so_many_places_are_remembered_and_no_more() -> None:
    seldom = Seldom(lambda: 0.0)
    assert all(seldom.filter(noisy("x", line)) for line in range(2000))
    assert len(seldom._until) == 500
    assert not seldom.filter(noisy("x", 1999))
    assert seldom.filter(noisy("x", 0)), "forgotten"


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, which has to be as it was before."""
    logger = logging.getLogger()
    before = list(logger.handlers), logger.level
    yield logger
    assert (list(logger.handlers), logger.level) == before


def test_every_logger_of_the_process_is_covered(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    undo = begin_logs(TelemetryConfig(log_format="json", log_level="info"), "router-0")
    try:
        logging.getLogger("actors.router").info("rerouted %d", 3)
        logging.getLogger("actors.router").debug("too small")
        logging.getLogger("uvicorn.error").info("not of interest")
        logging.getLogger("uvicorn.error").warning("of interest")
    finally:
        undo()
    logging.getLogger("actors.router").info("afterwards")

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["actor"]) for line in lines] == [
        ("rerouted 3", "router-0"),
        ("of interest", "router-0"),
    ]


def test_level_error_holds_for_other_packages_too(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    undo = begin_logs(TelemetryConfig(log_level="error"), "router-0")
    try:
        logging.getLogger("uvicorn.error").warning("not now")
    finally:
        undo()
    assert capsys.readouterr().err == ""
