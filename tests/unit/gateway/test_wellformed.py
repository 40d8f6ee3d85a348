"""Bytes that are no message end with INVALID_ARGUMENT; whole messages pass as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1 import inference_pb2_grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from cluster.gateway.wellformed import WellFormed

BROKEN = [
    b"\xff",  # a tag that never ends
    b"\x0a\x02\xff\xfe",  # model: two bytes that are no UTF-8
    pb.GenerateRequest(prompt="héllo").SerializeToString()[:-1],  # cut
]


class Echo(inference_pb2_grpc.InferenceServicer):
    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        for _ in range(2):
            yield pb.GenerateResponse(text=request.prompt)

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=request.request_id == "x")


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[WellFormed()])
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    inference_pb2_grpc.add_InferenceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def test_messages_pass(channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    assert [m.text async for m in stub.Generate(pb.GenerateRequest(prompt="é"), timeout=20)] == ["é", "é"]
    assert (await stub.Abort(pb.AbortRequest(request_id="x"), timeout=20)).aborted


async def test_a_stream_that_a_coroutine_writes_passes(channel: grpc.aio.Channel) -> None:
    """As the health service's Watch does."""
    stub, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
    watch = stub.Watch(request, timeout=20)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    assert (await stub.Check(request, timeout=20)).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("data", BROKEN)
async def test_what_is_no_message_is_an_invalid_argument(channel: grpc.aio.Channel, data: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        [m async for m in channel.unary_stream("/expertmesh.v1.Inference/Generate")(data, timeout=20)]
    with pytest.raises(grpc.aio.AioRpcError) as single:
        await channel.unary_unary("/expertmesh.v1.Inference/Abort")(data, timeout=20)
    for raised in (streamed, single):
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        detail = error_details_pb2.BadRequest()
        assert rpc_status.from_call(raised.value).details[0].Unpack(detail)
        assert detail.field_violations[0].field == "request"
