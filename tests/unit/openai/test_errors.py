"""One error, told over HTTP, and the same read from a gRPC status."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import grpc
import pytest

from cluster.gateway import errors
from cluster.gateway.status import abort
from cluster.openai.errors import from_rpc_error, http_error
from cluster.openai.requests import Endpoint, parse_request

CHAT = parse_request(Endpoint.CHAT, {"messages": [], "max_completion_tokens": 3})
EVERY = [
    (errors.InvalidRequest("stopping.max_tokens", "is 3; allowed is 1"), 400, "invalid_value"),
    (errors.UnknownModel("gpt", "tiny"), 404, "model_not_found"),
    (errors.Unauthenticated("TOKEN_MISSING", "a token is needed"), 401, "invalid_api_key"),
    (errors.PermissionDenied("ADMIN_NEEDED", "role admin"), 403, "insufficient_permissions"),
    (errors.Overloaded("QUEUE_FULL", 1.25), 429, "queue_full"),
    (errors.Unavailable("DRAINING", 0), 503, "draining"),
    (errors.DeadlineExceeded(), 504, "deadline_exceeded"),
    (errors.Cancelled(), 499, "cancelled"),
    (errors.Conflict("r1"), 409, "conflict"),
    (errors.FailedPrecondition("no seed"), 412, "failed_precondition"),
    (errors.Unimplemented("no adapters"), 501, "not_implemented"),
    (errors.Internal("NaN in layer 3"), 500, "internal_error"),
]


class _Failing(grpc.GenericRpcHandler):
    def __init__(self, error: BaseException) -> None:
        self._error = error

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def fail(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            await abort(context, self._error)

        return grpc.unary_unary_rpc_method_handler(fail)


async def over_grpc(folder: Path, error: BaseException) -> grpc.aio.AioRpcError:
    """What a client of a real server gets."""
    server = grpc.aio.server(handlers=[_Failing(error)])
    address = f"unix:{folder / 'socket'}"
    server.add_insecure_port(address)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/t/Unary")(b"")
    finally:
        await server.stop(grace=None)
    return caught.value


@pytest.mark.parametrize(("error", "status", "code"), EVERY, ids=lambda value: type(value).__name__)
async def test_both_ways_tell_the_same(tmp_path: Path, error: errors.ServiceError, status: int, code: str) -> None:
    told = http_error(error, CHAT)
    assert (told.status, told.code) == (status, code)
    assert from_rpc_error(await over_grpc(tmp_path, error), CHAT) == told


def test_the_list_covers_the_taxonomy() -> None:
    def leaves(kind: type) -> set[type]:
        below = kind.__subclasses__()
        return set().union(*map(leaves, below)) if below else {kind}

    assert {type(error) for error, *_ in EVERY} == leaves(errors.ServiceError)


def test_a_field_has_the_clients_name() -> None:
    told = http_error(EVERY[0][0], CHAT)
    assert told.body == {
        "error": {
            "message": "max_completion_tokens: is 3; allowed is 1",
            "type": "invalid_request_error",
            "param": "max_completion_tokens",
            "code": "invalid_value",
        }
    }


def test_when_to_come_again_is_told_in_both_ways() -> None:
    assert http_error(errors.Overloaded("QUEUE_FULL", 1.25)).headers == {"retry-after": "2", "retry-after-ms": "1250"}
    assert http_error(errors.Cancelled()).headers == {}
    assert http_error(errors.Unauthenticated("TOKEN_MISSING", "x")).headers == {"www-authenticate": "Bearer"}


def test_what_is_not_of_the_taxonomy_is_opaque(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        told = http_error(KeyError("secret of layer 3"), CHAT)
    assert told.status == 500
    match = re.fullmatch(r"internal error; reference ([0-9a-f]{16})", told.message)
    assert match is not None
    assert match[1] in caplog.text


class _Bare(grpc.RpcError):
    """As gRPC itself ends a call: without details."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "words of gRPC"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.UNAVAILABLE, 503),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 413),
        (grpc.StatusCode.UNKNOWN, 500),
        (grpc.StatusCode.INVALID_ARGUMENT, 400),
    ],
)
def test_what_grpc_itself_says(code: grpc.StatusCode, status: int) -> None:
    told = from_rpc_error(_Bare(code))
    assert (told.status, told.message, told.retry_after_s) == (status, "words of gRPC", None)
