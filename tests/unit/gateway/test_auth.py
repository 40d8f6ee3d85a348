"""Who gets through the interceptor, over real channels, for calls of every kind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.access import AccessList, Caller, token_hash
from cluster.config import TokenConfig
from cluster.gateway.auth import Doorkeeper, caller

INFERENCE, CONTROL = "/expertmesh.v1.Inference/", "/expertmesh.v1.Control/"
KNOWN = [
    TokenConfig(sha256=token_hash("user-token"), tenant="acme", share=3),
    TokenConfig(sha256=token_hash("admin-token"), tenant="ops", role="admin"),
]


def told() -> bytes:
    who = caller()
    return f"{who.tenant} {who.role} {who.share:g}".encode()


async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    return told()


async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    for _ in range(20):
        yield told()
        await asyncio.sleep(0)


async def both(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    async for _ in requests:
        yield told()


class Echo(grpc.GenericRpcHandler):
    """Unary, Stream and Both of any service of ours tell who calls; Flaky does when it is called again."""

    def __init__(self) -> None:
        self._again = False

    async def flaky(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        if not self._again:
            self._again = True
            await context.abort(grpc.StatusCode.UNAVAILABLE)
        yield told()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        service, _, method = details.method.rpartition("/")
        if f"{service}/" not in (INFERENCE, CONTROL):
            return None
        return {
            "Unary": grpc.unary_unary_rpc_method_handler(unary),
            "Stream": grpc.unary_stream_rpc_method_handler(stream),
            "Flaky": grpc.unary_stream_rpc_method_handler(self.flaky),
            "Both": grpc.stream_stream_rpc_method_handler(both),
        }.get(method)


RETRY = {
    "maxAttempts": 3,
    "initialBackoff": "0.01s",
    "maxBackoff": "0.01s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["UNAVAILABLE", "UNAUTHENTICATED"],
}
RETRYING = [("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": RETRY}]}))]


class Counting(AccessList):
    """How many calls came."""

    calls = 0

    def caller(self, token: str) -> Caller | None:
        self.calls += 1
        return super().caller(token)


class Door:
    """A server behind a Doorkeeper, and a plaintext channel to it."""

    def __init__(self, access: AccessList, options: Sequence[tuple[str, str]] = ()) -> None:
        self._options = options
        self._server = grpc.aio.server(handlers=[Echo()], interceptors=[Doorkeeper(access)])
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    async def __aenter__(self) -> Door:
        await self._server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", self._options)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self._server.stop(None)

    async def call(self, method: str, *headers: str) -> list[bytes]:
        """Every response. Raises grpc.aio.AioRpcError."""
        metadata = [("authorization", header) for header in headers]
        if method.endswith("Unary"):
            return [await self.channel.unary_unary(method)(b"", metadata=metadata, timeout=20)]
        if method.endswith("Both"):
            silent = self.channel.stream_stream(method)(metadata=metadata, timeout=20)
            if headers != ("Bearer user-token",):  # refused without having said a word
                return [await silent.read()]
            await silent.write(b"")
            await silent.done_writing()
            return [item async for item in silent]
        return [item async for item in self.channel.unary_stream(method)(b"", metadata=metadata, timeout=20)]


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with Door(AccessList(KNOWN)) as door:
        yield door


async def refused(door: Door, method: str, *headers: str) -> tuple[grpc.StatusCode, str]:
    """Code and ErrorInfo's reason; nothing but the trailers came, and no token is told back."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.call(method, *headers)
    error = caught.value
    assert not error.initial_metadata()
    rich = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert rich.message == error.details()
    info = error_details_pb2.ErrorInfo()
    (detail,) = rich.details
    assert detail.Unpack(info)
    assert info.domain == "expertmesh.dev"
    for header in headers:
        if token := header.partition(" ")[2]:
            assert token not in f"{error.details()} {error.trailing_metadata()}"
    return error.code(), info.reason


KINDS = ["Unary", "Stream", "Both"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_known_token_gets_through_and_the_handler_knows_whose(door: Door, kind: str) -> None:
    answers = await door.call(INFERENCE + kind, "Bearer user-token")
    assert set(answers) == {b"acme user 3"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ((), "TOKEN_MISSING"),
        (("user-token",), "TOKEN_MALFORMED"),
        (("Basic user-token",), "TOKEN_MALFORMED"),
        (("Bearer ",), "TOKEN_MALFORMED"),
        (("Bearer user-token", "Bearer admin-token"), "TOKEN_MALFORMED"),
        (("Bearer other-token",), "TOKEN_UNKNOWN"),
        ((f"Bearer {token_hash('user-token')}",), "TOKEN_UNKNOWN"),
    ],
)
async def test_without_a_known_token_nobody_does(door: Door, kind: str, headers: tuple[str, ...], reason: str) -> None:
    for service in (INFERENCE, CONTROL):
        assert await refused(door, service + kind, *headers) == (grpc.StatusCode.UNAUTHENTICATED, reason)


async def test_control_is_for_admins(door: Door) -> None:
    wanted = (grpc.StatusCode.PERMISSION_DENIED, "ADMIN_NEEDED")
    assert await refused(door, CONTROL + "Unary", "Bearer user-token") == wanted
    assert await refused(door, CONTROL + "Stream", "Bearer user-token") == wanted
    assert await refused(door, CONTROL + "NoSuchMethod", "Bearer user-token") == wanted
    assert await door.call(CONTROL + "Unary", "Bearer admin-token") == [b"ops admin 1"]
    assert await door.call(INFERENCE + "Unary", "Bearer admin-token") == [b"ops admin 1"]


@pytest.mark.parametrize("method", ["/no.such.Service/Method", "/grpc.health.v1.Healthy/Check", INFERENCE + "Nothing"])
async def test_what_is_not_there_is_told_to_callers_with_a_token_alone(door: Door, method: str) -> None:
    assert (await refused(door, method))[0] == grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.call(method, "Bearer user-token")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("headers", [(), (("authorization", "Bearer other"),)])
async def test_health_needs_no_token(door: Door, headers: tuple[tuple[str, str], ...]) -> None:
    stub = health_pb2_grpc.HealthStub(door.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), metadata=headers, timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_callers_at_the_same_time_are_not_mixed_up(door: Door) -> None:
    headers = ["Bearer user-token", "Bearer admin-token"] * 10
    answers = await asyncio.gather(*(door.call(INFERENCE + "Stream", header) for header in headers))
    assert answers == [[b"acme user 3"] * 20, [b"ops admin 1"] * 20] * 10


@pytest.mark.parametrize("headers", [(), ("Bearer whatever",), ("nonsense", "twice")])
async def test_without_tokens_everybody_is_an_admin(headers: tuple[str, ...]) -> None:
    async with Door(AccessList()) as door:
        assert await door.call(CONTROL + "Unary", *headers) == [b" admin 1"]
        assert set(await door.call(INFERENCE + "Stream", *headers)) == {b" admin 1"}


async def test_clients_can_retry_what_ended_before_its_first_message() -> None:
    """They cannot once initial metadata came, be it empty: neither a refusal nor an answer sends it early."""
    access = Counting(KNOWN)
    async with Door(access, RETRYING) as door:
        assert await door.call(INFERENCE + "Flaky", "Bearer user-token") == [b"acme user 3"]
        assert access.calls == 2
        await refused(door, INFERENCE + "Stream", "Bearer other-token")
        assert access.calls == 2 + RETRY["maxAttempts"]


def test_outside_of_a_call_there_is_no_caller() -> None:
    with pytest.raises(LookupError):
        caller()


def test_settings_may_be_printed() -> None:
    """The access list's text tells nothing of its entries."""
    assert token_hash("user-token") not in repr(AccessList(KNOWN))
