"""Traces as they travel; and that actors know no more of OpenTelemetry than its API."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from opentelemetry.trace import NonRecordingSpan, get_current_span

import actors
from actors.trace_context import trace_from, traceparent_of
from tests.span_recorder import PARENT_ID, TRACE_ID, TRACEPARENT

API = ("opentelemetry.trace", "opentelemetry.context", "opentelemetry.propagate")


def test_a_traceparent_comes_back() -> None:
    context = get_current_span(trace_from(TRACEPARENT)).get_span_context()
    assert (context.trace_id, context.span_id, context.is_remote) == (TRACE_ID, PARENT_ID, True)
    assert context.trace_flags.sampled
    assert traceparent_of(NonRecordingSpan(context)) == TRACEPARENT
    unsampled = TRACEPARENT[:-1] + "0"
    assert not get_current_span(trace_from(unsampled)).get_span_context().trace_flags.sampled


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "00",
        TRACEPARENT[:-1],
        TRACEPARENT + "-00",
        " " + TRACEPARENT,
        TRACEPARENT + "\n",
        TRACEPARENT.upper(),
        f"ff-{TRACE_ID:032x}-{PARENT_ID:016x}-01",
        f"00-{0:032x}-{PARENT_ID:016x}-01",
        f"00-{TRACE_ID:032x}-{0:016x}-01",
        "x" * 10_000,
    ],
)
def test_what_is_no_traceparent_is_refused_by_name(bad: str) -> None:
    with pytest.raises(ValueError, match=r"traceparent is .*, must be 00-") as caught:
        trace_from(bad)
    assert len(str(caught.value)) < 250


def test_actors_import_the_api_alone() -> None:
    """Which provider records, and where it exports to, is decided for the process as a whole."""
    used = set()
    for file in Path(actors.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used |= {name for name in names if name.startswith("opentelemetry")}
    assert used
    assert [name for name in used if not name.startswith(API)] == []
