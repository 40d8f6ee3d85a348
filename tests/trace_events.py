"""What a trace in Chrome's Trace Event Format has to be."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from jsonschema import Draft202012Validator

_EVENT = {
    "type": "object",
    "required": ["name", "ph", "ts", "pid", "tid", "args"],
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "ph": {"enum": ["X", "M"]},
        "cat": {"type": "string"},
        "ts": {"type": "number", "minimum": 0},
        "dur": {"type": "number", "minimum": 0},
        "pid": {"type": "integer", "minimum": 1},
        "tid": {"type": "integer", "minimum": 0},
        "args": {"type": "object"},
    },
    "additionalProperties": False,
    "if": {"properties": {"ph": {"const": "X"}}},
    "then": {"required": ["dur"]},
}
_TRACE = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {"traceEvents": {"type": "array", "items": _EVENT}, "displayTimeUnit": {"enum": ["ms", "ns"]}},
    "additionalProperties": False,
}


def check_events(trace: dict[str, Any]) -> None:
    """Well-formed; every thread has its name; spans are in order, and nest within their lane."""
    Draft202012Validator(_TRACE).validate(trace)
    events = trace["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert threads == {(span["pid"], span["tid"]) for span in spans}
    assert {span["pid"] for span in spans} <= {event["pid"] for event in events if event["name"] == "process_name"}
    assert spans == sorted(spans, key=lambda span: (span["ts"], -span["dur"]))
    lanes = defaultdict(list)
    for span in spans:
        lanes[span["pid"], span["tid"]].append((round(span["ts"] * 1000), round((span["ts"] + span["dur"]) * 1000)))
    for lane in lanes.values():
        _check_nesting(lane)


def _check_nesting(lane: list[tuple[int, int]]) -> None:
    """(start, end) in nanoseconds, by start: each lies within the ones that have not ended."""
    open_ends: list[int] = []
    for start, end in lane:
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], f"{start} to {end} ends after what contains it"
        open_ends.append(end)
