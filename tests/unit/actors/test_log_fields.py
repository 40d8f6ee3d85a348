"""To which request an error belongs, whoever logs it."""

from __future__ import annotations

import pytest

from actors.log_fields import fields_of, mark, trace_ids
from tests.span_recorder import PARENT_ID, TRACE_ID, TRACEPARENT


def test_an_error_that_came_of_a_marked_one_has_its_fields() -> None:
    cause, error = ValueError("why"), RuntimeError("what")
    mark(cause, request_id="r", trace_id=None)
    error.__cause__ = cause
    assert fields_of(cause) == fields_of(error) == {"request_id": "r"}
    assert fields_of(RuntimeError()) == fields_of(None) == {}


def test_who_knows_an_error_better_has_marked_it_before() -> None:
    error = ValueError()
    mark(error, trace_id="a")
    mark(error, trace_id="b", request_id="r")
    assert fields_of(error) == {"trace_id": "a", "request_id": "r"}


def test_ids_of_a_traceparent() -> None:
    assert trace_ids(TRACEPARENT) == {"trace_id": f"{TRACE_ID:032x}", "span_id": f"{PARENT_ID:016x}"}
    assert trace_ids("") == {}
    with pytest.raises(ValueError, match="traceparent is 'garbage'"):
        trace_ids("garbage")
