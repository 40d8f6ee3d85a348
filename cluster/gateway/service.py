"""``expertmesh.v1.Inference``. Each method is short: validate, ask the room that knows, answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1 import inference_pb2_grpc

from cluster.gateway.answer import Answer
from cluster.gateway.auth import caller
from cluster.gateway.served_model import ServedModel
from cluster.gateway.status import abort
from cluster.gateway.stream import Stream
from cluster.gateway.streams import Streams
from cluster.gateway.validation import validate


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
            stream = await self._streams.open(valid, context.time_remaining(), caller().tenant)
            answer = Answer(valid, self._model)
            while not answer.finished:
                for message in answer.push(await self._streams.next_events(stream)):
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
        """End a running request of the caller's tenant by the client's id."""
        stream = self._streams.find(request.request_id, caller().tenant)
        if stream is not None:
            self._streams.abort(stream)
        return pb.AbortResponse(aborted=stream is not None)
