"""A gateway that says what a test tells it to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from expertmesh.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from expertmesh.v1 import inference_pb2 as pb

Script = Callable[[pb.GenerateRequest, Any], AsyncIterator[pb.GenerateResponse]]


class _Inference(inference_pb2_grpc.InferenceServicer):
    def __init__(self, script: Script, context_length: int) -> None:
        self._script, self._context_length = script, context_length

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for message in self._script(request, context):
            yield message

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(context_length=self._context_length, vocab_size=1000)


class _Control(control_pb2_grpc.ControlServicer):
    def __init__(self, looks: int) -> None:
        self._left = looks

    async def GetCluster(self, request: Any, context: Any) -> control_pb2.GetClusterResponse:
        self._left -= 1
        if self._left < 0:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "for admins")
        load = control_pb2.AttentionLoad(kv_blocks=10, kv_blocks_free=4)
        return control_pb2.GetClusterResponse(actors=[control_pb2.Actor(attention=load)])


@asynccontextmanager
async def scripted(script: Script, context_length: int = 512, looks: int = 10**9) -> AsyncIterator[str]:
    """Its address. ``GetCluster`` is answered so many times, and refused then."""
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(_Inference(script, context_length), server)
    control_pb2_grpc.add_ControlServicer_to_server(_Control(looks), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
