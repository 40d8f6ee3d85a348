from __future__ import annotations

import logging
import math
import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.gateway import errors, status

DETAILS = (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo)


def unpacked(rich: status_pb2.Status) -> list[Message]:
    """The details in their own types."""
    found = []
    for packed in rich.details:
        detail = next(kind() for kind in DETAILS if packed.Is(kind.DESCRIPTOR))
        packed.Unpack(detail)
        found.append(detail)
    return found


@pytest.mark.parametrize(
    ("error", "code", "kinds"),
    [
        (errors.InvalidRequest("prompt", "is empty"), grpc.StatusCode.INVALID_ARGUMENT, ["BadRequest"]),
        (errors.UnknownModel("gpt", "tiny"), grpc.StatusCode.NOT_FOUND, ["ErrorInfo"]),
        (errors.Unauthenticated("TOKEN_MISSING", "a token is needed"), grpc.StatusCode.UNAUTHENTICATED, ["ErrorInfo"]),
        (errors.PermissionDenied("ADMIN_NEEDED", "role admin"), grpc.StatusCode.PERMISSION_DENIED, ["ErrorInfo"]),
        (
            errors.Overloaded("QUEUE_FULL", 1.5),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            ["ErrorInfo", "RetryInfo"],
        ),
        (errors.Unavailable("DRAINING", 0), grpc.StatusCode.UNAVAILABLE, ["ErrorInfo", "RetryInfo"]),
        (errors.DeadlineExceeded(), grpc.StatusCode.DEADLINE_EXCEEDED, []),
        (errors.Cancelled(), grpc.StatusCode.CANCELLED, []),
        (errors.Conflict("r1"), grpc.StatusCode.ALREADY_EXISTS, []),
        (errors.FailedPrecondition("no seed"), grpc.StatusCode.FAILED_PRECONDITION, []),
        (errors.Unimplemented("no adapters"), grpc.StatusCode.UNIMPLEMENTED, []),
        (errors.Internal("NaN in layer 3"), grpc.StatusCode.INTERNAL, []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_error_has_its_code_and_details(
    error: errors.ServiceError, code: grpc.StatusCode, kinds: list[str]
) -> None:
    rich = status.to_status(error)
    assert rich.code == code.value[0]
    assert rich.message == str(error)
    assert [type(detail).__name__ for detail in unpacked(rich)] == kinds


def test_the_table_covers_the_taxonomy() -> None:
    def leaves(kind: type) -> set[type]:
        below = kind.__subclasses__()
        return set().union(*map(leaves, below)) if below else {kind}

    assert set(status._CODES) == leaves(errors.ServiceError)


def test_a_bad_field_is_named() -> None:
    (detail,) = unpacked(status.to_status(errors.InvalidRequest("stopping.stop[2]", "is empty")))
    (violation,) = detail.field_violations
    assert (violation.field, violation.description) == ("stopping.stop[2]", "is empty")


def test_reason_and_delay_are_told() -> None:
    info, retry = unpacked(status.to_status(errors.Overloaded("QUEUE_FULL", 1.25)))
    assert (info.reason, info.domain) == ("QUEUE_FULL", "expertmesh.dev")
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 250_000_000)


@pytest.mark.parametrize("reason", ["queue full", "", "A", "1A2", "QUEUE_", "Q" * 64])
def test_a_reason_outside_the_convention_is_refused(reason: str) -> None:
    with pytest.raises(ValueError, match="UPPER_SNAKE_CASE"):
        errors.Overloaded(reason, 1)


@pytest.mark.parametrize("delay", [-1, math.nan, math.inf])
def test_a_delay_that_is_none_is_refused(delay: float) -> None:
    with pytest.raises(ValueError, match="retry_after_s"):
        errors.Unavailable("DRAINING", delay)


def test_what_is_not_of_the_taxonomy_is_opaque(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        rich = status.to_status(KeyError("secret of layer 3"))
    assert rich.code == grpc.StatusCode.INTERNAL.value[0]
    match = re.fullmatch(r"internal error; reference ([0-9a-f]{16})", rich.message)
    assert match is not None
    assert not rich.details
    (record,) = caplog.records
    assert match[1] in record.getMessage()
    assert "secret of layer 3" in record.getMessage()


def test_internal_details_are_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    error = errors.Internal("NaN in layer 3")
    with caplog.at_level(logging.ERROR):
        rich = status.to_status(error)
    assert "NaN" not in rich.message
    assert f"{error.reference}: NaN in layer 3" in caplog.text


@pytest.mark.parametrize("char", ["x", "é", "🙂", "\ud800", "\n"])
def test_long_texts_are_cut_between_characters(char: str) -> None:
    error = errors.InvalidRequest("f" * 10_000, char * 100_000)
    rich = status.to_status(error)
    trailers = rpc_status.to_status(rich)
    percent_encoded = sum(1 if 32 <= b < 127 and b != 37 else 3 for b in trailers.details.encode())
    base64 = sum(-(-len(value) // 3) * 4 for _, value in trailers.trailing_metadata)
    assert percent_encoded + base64 < 8000
    (detail,) = unpacked(rich)
    assert detail.field_violations[0].description.endswith("…")
    assert "\ufffd" not in detail.field_violations[0].description


class _Failing(grpc.GenericRpcHandler):
    """Answers every call by ending it with the error it is named after."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            yield b"one"
            await status.abort(context, self._error)

        async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            await status.abort(context, self._error)

        if details.method == "/t/Stream":
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


async def _finish(channel: grpc.aio.Channel, method: str) -> None:
    if method == "/t/Stream":
        assert [item async for item in channel.unary_stream(method)(b"")]
    else:
        await channel.unary_unary(method)(b"")


async def failed_call(folder: Path, error: BaseException, method: str) -> grpc.aio.AioRpcError:
    """What a client of a real server gets."""
    server = grpc.aio.server(handlers=[_Failing(error)])
    address = f"unix:{folder / 'socket'}"
    server.add_insecure_port(address)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _finish(channel, method)
    finally:
        await server.stop(grace=None)
    return caught.value


@pytest.mark.parametrize("method", ["/t/Unary", "/t/Stream"])
async def test_a_client_sees_the_status_with_its_details(tmp_path: Path, method: str) -> None:
    failure = await failed_call(tmp_path, errors.Overloaded("QUEUE_FULL", 2), method)
    assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    rich = status_pb2.Status.FromString(dict(failure.trailing_metadata())["grpc-status-details-bin"])
    assert [type(detail).__name__ for detail in unpacked(rich)] == ["ErrorInfo", "RetryInfo"]


async def test_the_longest_status_passes_a_clients_limit(tmp_path: Path) -> None:
    failure = await failed_call(tmp_path, errors.InvalidRequest("é" * 9999, "🙂" * 9999), "/t/Unary")
    assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc-status-details-bin" in dict(failure.trailing_metadata())


async def test_a_foreign_error_reaches_the_client_opaque(tmp_path: Path) -> None:
    failure = await failed_call(tmp_path, RuntimeError("secret"), "/t/Unary")
    assert failure.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in f"{failure.details()} {failure.trailing_metadata()}"
