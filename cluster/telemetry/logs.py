"""The log of one process: every ``logging`` record as one line on stderr, as text or as a JSON object.

What a client chose (names, ids, the message of an error) may be in a record, and none of it can look like another
record: control characters are escaped, and lines that follow the first of a record (tracebacks) are indented.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, Literal

import structlog

from actors.log_fields import fields_of
from cluster.config import TelemetryConfig

_QUIET = ("asyncio", "grpc", "httpx", "httpx2", "huggingface_hub", "opentelemetry", "urllib3", "uvicorn")
"""Packages of others: from warnings on, and those seldom (see ``Seldom``)."""
_SELDOM_S = 30.0
_PLACES = 500
_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)
_HEAD = ("timestamp", "level", "logger", "event", "actor", "exception")

_Fields = MutableMapping[str, Any]


def begin_logs(config: TelemetryConfig, actor: str) -> Callable[[], None]:
    """Let this process log as configured. Returns what undoes it."""
    handler = _Stderr()
    handler.setLevel(config.log_level.upper())
    handler.setFormatter(formatter(config.log_format, actor))
    handler.addFilter(Seldom(time.monotonic))
    root = logging.getLogger()
    levels = [(logger, logger.level) for logger in (root, *map(logging.getLogger, _QUIET))]
    root.addHandler(handler)
    root.setLevel(config.log_level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)

    def undo() -> None:
        root.removeHandler(handler)
        for logger, level in levels:
            logger.setLevel(level)

    return undo


def formatter(log_format: Literal["text", "json"], actor: str) -> logging.Formatter:
    """For a handler of the standard library."""
    render = structlog.processors.JSONRenderer(ensure_ascii=True) if log_format == "json" else _text
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_details],
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # no locals of the frames: they may be prompts
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _sorted(actor),
            render,
        ],
    )


class _Stderr(logging.Handler):
    """To whatever is stderr at the time: a progress bar takes its place for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # as every handler of the standard library: a log that cannot be written stops nobody
            self.handleError(record)


class Seldom(logging.Filter):
    """Lets records of other people's packages through, from each place in their code at most one in half a minute: a
    collector that is down, or a client that sends garbage, must not fill the log. ``clock`` in seconds.

    Records of one place that tell different exceptions, by type or by where they were raised, are different ones; the
    text does not matter, which may be new each time. The last few hundred places are remembered.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._until: dict[Hashable, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """True if the record is to be logged."""
        if record.name.partition(".")[0] not in _QUIET:
            return True
        now, key = self._clock(), _origin(record)
        with self._lock:
            if now < self._until.get(key, now):
                return False
            self._until.pop(key, None)
            self._until[key] = now + _SELDOM_S  # the latest is the last
            if len(self._until) > _PLACES:
                del self._until[next(iter(self._until))]
        return True


def _origin(record: logging.LogRecord) -> Hashable:
    """Where in the code a record was made, and the exception that it tells, if it does."""
    kind, _, frames = record.exc_info or (None, None, None)
    raised = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(frames)][-1:]
    return (record.name, record.levelno, record.pathname, record.lineno, kind, *raised)


def _details(logger: Any, method: str, event: _Fields) -> _Fields:
    """A record's own fields, and those of the error that it tells."""
    exception = event.get("exc_info")
    event.update(fields_of(exception[1] if exception else None))
    event.update(getattr(event["_record"], "fields", {}))
    return event


def _sorted(actor: str) -> Callable[[Any, str, _Fields], _Fields]:
    """The fields that every line has come first."""

    def sort(logger: Any, method: str, event: _Fields) -> _Fields:
        event["actor"] = actor
        head = {key: event[key] for key in _HEAD if key in event}
        return head | {key: value for key, value in event.items() if key not in head}

    return sort


def _text(logger: Any, method: str, event: _Fields) -> str:
    head = f"{event['timestamp']} {event['level']:<7} {event['actor']} {event['logger']}: {_escaped(event['event'])}"
    rest = [f"{key}={_value(value)}" for key, value in event.items() if key not in _HEAD]
    trace_lines = [f"\n    {_escaped(line)}" for line in str(event.get("exception", "")).splitlines()]
    return " ".join([head, *rest]) + "".join(trace_lines)


def _value(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
