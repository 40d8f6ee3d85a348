"""The gRPC services. Each method is short: validate, ask the room that knows, answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import grpc
from expertmesh.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from expertmesh.v1 import inference_pb2 as pb

from actors.engine.request import TokenEvent
from cluster.fleet import ActorHandle, ActorUnreachable
from cluster.gateway.answer import Answer
from cluster.gateway.errors import Unavailable
from cluster.gateway.served_model import ServedModel
from cluster.gateway.status import abort
from cluster.gateway.streams import Stream, Streams
from cluster.gateway.validation import validate

_CONTROL_TIMEOUT_S = 10.0


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """``expertmesh.v1.Inference``."""

    def __init__(self, model: ServedModel, streams: Streams) -> None:
        self._model = model
        self._streams = streams
        self.requests = 0

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Validate, admit, and stream until the answer is finished; whatever ends the call frees the request."""
        self.requests += 1
        stream: Stream | None = None
        try:
            # rendering and tokenising a long prompt takes time: not in the loop that serves every other stream
            valid = await asyncio.to_thread(validate, request, self._model)
            stream = await self._streams.open(valid, context.time_remaining())
            answer = Answer(valid, self._model)
            while not answer.finished:
                for message in answer.push(await _next_events(stream)):
                    yield message
        except Exception as error:
            await abort(context, error)
        finally:
            if stream is not None:
                self._streams.close(stream)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """What is served."""
        model, sampling = self._model, self._model.default_sampling
        return pb.GetModelInfoResponse(
            model=model.name,
            model_type=model.model_type,
            dtype=model.dtype,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            layers=model.layers,
            moe_layers=model.moe_layers,
            experts_per_layer=model.experts_per_layer,
            experts_per_token=model.experts_per_token,
            chat=model.chat is not None,
            stop_token_ids=sorted(model.stop_ids),
            default_sampling=pb.SamplingParameters(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
            ),
        )

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        """End a running request by the client's id."""
        stream = self._streams.find(request.request_id)
        if stream is not None:
            self._streams.abort(stream)
        return pb.AbortResponse(aborted=stream is not None)


class ControlService(control_pb2_grpc.ControlServicer):
    """``expertmesh.v1.Control``: the controller's answers."""

    def __init__(self, controller: ActorHandle) -> None:
        self._controller = controller

    async def GetCluster(
        self, request: control_pb2.GetClusterRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.GetClusterResponse:
        """What runs where."""
        try:
            return control_pb2.GetClusterResponse.FromString(await self._ask("view"))
        except Exception as error:
            await abort(context, error)

    async def _ask(self, method: str) -> bytes:
        try:
            call: Awaitable[bytes] = asyncio.wrap_future(self._controller.begin(method))
            return await asyncio.wait_for(call, _CONTROL_TIMEOUT_S)
        except (ActorUnreachable, TimeoutError) as error:
            raise Unavailable("CONTROLLER_DOWN", 1.0) from error


async def _next_events(stream: Stream) -> list[TokenEvent]:
    """At least one event, and whatever else is there already."""
    events = [await stream.events.get()]
    while not stream.events.empty():
        events.append(stream.events.get_nowait())
    return events
