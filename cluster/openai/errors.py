"""What a call ended with, as an OpenAI client is told: a status, headers, and ``{"error": {...}}``.

Everything goes through the ``google.rpc`` status (``cluster.gateway.status``): there errors are cut, made opaque and
logged. So a client that speaks gRPC to the gateway, as the batch does, makes of a status exactly what the HTTP door
makes of the error behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.gateway.status import to_status
from cluster.openai.requests import Parsed

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_CLIENT, _SERVER, _LIMIT = "invalid_request_error", "server_error", "rate_limit_error"

# status, type, and the code where the status brings no reason of its own
_ANSWERS = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, _CLIENT, "invalid_value"),
    grpc.StatusCode.NOT_FOUND: (404, _CLIENT, "model_not_found"),
    grpc.StatusCode.UNAUTHENTICATED: (401, _CLIENT, "invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: (403, _CLIENT, "insufficient_permissions"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, _LIMIT, "rate_limit_exceeded"),
    grpc.StatusCode.UNAVAILABLE: (503, _SERVER, "unavailable"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, _SERVER, "deadline_exceeded"),
    grpc.StatusCode.CANCELLED: (499, _CLIENT, "cancelled"),
    grpc.StatusCode.ALREADY_EXISTS: (409, _CLIENT, "conflict"),
    grpc.StatusCode.FAILED_PRECONDITION: (412, _CLIENT, "failed_precondition"),
    grpc.StatusCode.UNIMPLEMENTED: (501, _SERVER, "not_implemented"),
}
_OTHER = (500, _SERVER, "internal_error")
_TOO_LARGE = (413, _CLIENT, "request_too_large")
_TOLD_BY_REASON = (429, 503)
"""Their code says which limit, or what is away."""


@dataclass(frozen=True)
class HttpError:
    """``retry_after_s``: when to come again, None if that will not help or nobody knows."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None
    extra_headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON."""
        told = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After counts whole seconds; OpenAI's clients also know the exact one."""
        found = dict(self.extra_headers)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            found["retry-after"] = str(math.ceil(self.retry_after_s))
            found["retry-after-ms"] = str(math.ceil(self.retry_after_s * 1000))
        return found


def http_error(error: BaseException, parsed: Parsed | None = None) -> HttpError:
    """For anything that a call may end with. What is no ServiceError is told as a reference and logged under it.

    ``parsed``: the request, once there is one; its client's names of fields are used then.
    """
    return _of_status(to_status(error), parsed)


def from_rpc_error(error: grpc.RpcError, parsed: Parsed | None = None) -> HttpError:
    """For what a gRPC call to the gateway ended with; the same as the HTTP door would have told."""
    return _of_status(rpc_status.from_call(error) or _bare(error), parsed)


def _bare(error: grpc.RpcError) -> status_pb2.Status:
    return status_pb2.Status(code=error.code().value[0], message=error.details() or "")


def _of_status(told: status_pb2.Status, parsed: Parsed | None) -> HttpError:
    code = _CODES.get(told.code, grpc.StatusCode.UNKNOWN)
    status, kind, word = _ANSWERS.get(code, _OTHER)
    bad, info, retry = (
        _detail(told, message)
        for message in (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo)
    )
    message, param = told.message, None
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and info is None:  # gRPC's own: a message that is too large
        status, kind, word = _TOO_LARGE
    if status in _TOLD_BY_REASON and info is not None:
        word = info.reason.lower()
    if code == grpc.StatusCode.NOT_FOUND:
        param = "model"
    if bad is not None:
        violation = bad.field_violations[0]
        param = parsed.param(violation.field) if parsed else violation.field
        message = f"{param}: {violation.description}"
    delay = retry.retry_delay.ToTimedelta().total_seconds() if retry is not None else None
    return HttpError(status, message, kind, word, param, delay)


def _detail(told: status_pb2.Status, kind: Any) -> Any:
    for packed in told.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None
