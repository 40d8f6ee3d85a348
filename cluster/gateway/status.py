"""The one place that turns the taxonomy of ``errors.py`` into gRPC status with ``google.rpc`` details."""

from __future__ import annotations

import logging
from typing import NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.gateway import errors

ERROR_DOMAIN = "expertmesh.dev"

# gRPC peers drop a call whose metadata passes 8 KiB. The message travels twice: percent-encoded in
# grpc-message (up to three bytes a byte) and, with the details, in base64 (4/3); with these limits the sum
# stays under 7 KiB.
_MESSAGE_BYTES = 1024
_DESCRIPTION_BYTES = 1024
_FIELD_BYTES = 256
_ELLIPSIS = "…"

_CODES: dict[type[BaseException], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownModel: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Conflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.Internal: grpc.StatusCode.INTERNAL,
}

_log = logging.getLogger(__name__)


def status_code(error: BaseException) -> grpc.StatusCode:
    """The code a call ends with; INTERNAL for anything outside the taxonomy."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def to_status(error: BaseException) -> status_pb2.Status:
    """The status a call ends with, short enough for trailing metadata.

    Anything outside the taxonomy becomes INTERNAL: the client gets a reference, the log the error under it.
    """
    if not isinstance(error, errors.ServiceError) or type(error) not in _CODES:
        internal = errors.Internal(f"{type(error).__name__}: {error}")
        internal.__cause__ = error
        return to_status(internal)
    if isinstance(error, errors.Internal):
        _log.error("internal error %s: %s", error.reference, error.detail, exc_info=error)
    status = status_pb2.Status(code=_CODES[type(error)].value[0], message=_clip(str(error), _MESSAGE_BYTES))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> NoReturn:
    """Ends a grpc.aio call with ``to_status(error)``. Always raises (grpc's own AbortError): the handler
    ends here."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort_with_status returned")


def _details(error: errors.ServiceError) -> list[Message]:
    match error:
        case errors.InvalidRequest():
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=_clip(error.field, _FIELD_BYTES),
                description=_clip(error.description, _DESCRIPTION_BYTES),
            )
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case errors.UnknownModel():
            return [_error_info("MODEL_NOT_FOUND")]
        case errors.Unauthenticated() | errors.PermissionDenied():
            return [_error_info(error.reason)]
        case errors.FailedPrecondition() if error.reason:
            return [_error_info(error.reason)]
        case errors.Overloaded() | errors.Unavailable():
            delay = Duration()
            delay.FromNanoseconds(round(error.retry_after_s * 1e9))
            return [_error_info(error.reason), error_details_pb2.RetryInfo(retry_delay=delay)]
        case _:
            return []


def _error_info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN)


def _clip(text: str, limit: int) -> str:
    """``text`` if it takes at most ``limit`` bytes of UTF-8, else a head of it that does, marked as cut."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode("utf-8")
    return data[: limit - len(_ELLIPSIS.encode())].decode("utf-8", "ignore") + _ELLIPSIS
