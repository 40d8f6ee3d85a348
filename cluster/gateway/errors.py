"""Everything a call can end with, told in the words of the service.

The doors turn these into their own protocol (``status.py`` for gRPC). The text of an error goes to the
client and into logs: it names fields, values of parameters and what is allowed, and never quotes a prompt.
"""

from __future__ import annotations

import math
import re
import uuid

_REASON = re.compile(r"[A-Z][A-Z0-9_]{1,61}[A-Z0-9]")
_SHOWN_NAME_CHARS = 100


class ServiceError(Exception):
    """Root of the taxonomy: a call ended without a complete answer, and the client may know why."""


class InvalidRequest(ServiceError):
    """One field of the request cannot be served, now or later.

    ``field`` is the path in the request message (``stopping.stop[2]``); ``description`` says what is wrong
    and what is allowed.
    """

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class UnknownModel(ServiceError):
    """The request names a model that is not served here."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"model {name[:_SHOWN_NAME_CHARS]!r} is not served here; served is {served!r}")
        self.name = name


class _Refused(ServiceError):
    """The caller may not; ``reason`` is from a closed set, in UPPER_SNAKE_CASE."""

    def __init__(self, reason: str, description: str) -> None:
        super().__init__(description)
        self.reason = reason


class Unauthenticated(_Refused):
    """Nobody knows who calls (``TOKEN_MISSING``, ``TOKEN_MALFORMED``, ``TOKEN_UNKNOWN``)."""


class PermissionDenied(_Refused):
    """The caller is known and may not do that (``ADMIN_NEEDED``)."""


QUEUE_FULL = "QUEUE_FULL"
CHANGES_WAITING = "CHANGES_WAITING"
DRAINING = "DRAINING"
SHARDS_DOWN = "SHARDS_DOWN"
CONTROLLER_DOWN = "CONTROLLER_DOWN"

RETRY_S = 1.0
"""When to come again where nobody knows better."""


class _RetryLater(ServiceError):
    """Nothing is wrong with the request; ``reason`` is from a closed set and ``retry_after_s`` is in
    seconds."""

    def __init__(self, reason: str, retry_after_s: float = RETRY_S) -> None:
        """Raises ValueError for a reason that is not UPPER_SNAKE_CASE or a delay that is negative or not
        finite."""
        if not _REASON.fullmatch(reason):
            raise ValueError(f"reason is {reason!r}; allowed is UPPER_SNAKE_CASE of 3 to 63 characters")
        if not (math.isfinite(retry_after_s) and retry_after_s >= 0):
            raise ValueError(f"retry_after_s is {retry_after_s!r}; allowed are finite seconds >= 0")
        words = reason.replace("_", " ").lower()
        super().__init__(f"{words}; retry in {retry_after_s:.3g} s")
        self.reason = reason
        self.retry_after_s = retry_after_s


class Overloaded(_RetryLater):
    """The service, or the caller's share of it, is full (``QUEUE_FULL``, ``CHANGES_WAITING``)."""


class Unavailable(_RetryLater):
    """The service cannot answer for the moment (``DRAINING``, ``SHARDS_DOWN``, ``CONTROLLER_DOWN``)."""


class DeadlineExceeded(ServiceError):
    """The client's deadline passed before the answer was complete."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the answer was complete")


class Cancelled(ServiceError):
    """The client went away, or an Abort call ended the request."""

    def __init__(self) -> None:
        super().__init__("the request was cancelled")


class Conflict(ServiceError):
    """A request of that id is known, with another body."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id {request_id!r} is in use by a request with another body")
        self.request_id = request_id


class FailedPrecondition(ServiceError):
    """The request is well formed, but the state it relies on is not there. ``reason`` is from a closed set, in
    UPPER_SNAKE_CASE (``NO_ROOM``, ``CHANGE_FAILED``, ``TRACE_RUNNING``), or empty."""

    def __init__(self, description: str, reason: str = "") -> None:
        super().__init__(description)
        self.reason = reason


class Unimplemented(ServiceError):
    """The request asks for a feature that is off."""


class Internal(ServiceError):
    """A fault of ours. The client sees ``reference`` alone; ``detail`` is for the log, which carries both."""

    def __init__(self, detail: str) -> None:
        self.reference = uuid.uuid4().hex[:16]
        self.detail = detail
        super().__init__(f"internal error; reference {self.reference}")
