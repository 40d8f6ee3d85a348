"""What a log record has beside its message, and to which request an error belongs.

The fields travel on the record (``extra``) or on the exception: whoever logs an error is often another task than the
one in which its request was carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.trace_context import split_traceparent

_MARK = "_expertmesh_fields"


def fields(**values: Any) -> dict[str, Any]:
    """``extra`` for a logging call whose record has more than a message; None is left out."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


def trace_ids(traceparent: str) -> dict[str, str]:
    """``trace_id`` and ``span_id`` of the span that ``traceparent`` names; nothing if that is empty. ValueError for
    what is no traceparent."""
    if not traceparent:
        return {}
    trace_id, span_id = split_traceparent(traceparent)
    return {"trace_id": trace_id, "span_id": span_id}


def mark(error: BaseException, **values: str | None) -> None:
    """Let every record of ``error`` have these fields; what it has already stays."""
    known = dict(fields_of(error))
    setattr(error, _MARK, fields(**values)["fields"] | known)


def fields_of(error: BaseException | None) -> Mapping[str, str]:
    """The fields of ``error``, or of the first of its causes that has some."""
    while error is not None:
        found: Mapping[str, str] | None = vars(error).get(_MARK)
        if found is not None:
            return found
        error = error.__cause__
    return {}
