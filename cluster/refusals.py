"""Why a change that was asked for is not made."""

from __future__ import annotations


class BadOperation(ValueError):
    """The change cannot be made. ``field`` is the request's field."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(field, description)
        self.field = field
        self.description = description

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class ChangeFailed(RuntimeError):
    """A change could not be completed; what was in force stays, and the text says why."""


class TraceRunning(RuntimeError):
    """There is one trace at a time, and it is being recorded."""


class Busy(RuntimeError):
    """Too many changes are asked for at a time; nothing was done."""
