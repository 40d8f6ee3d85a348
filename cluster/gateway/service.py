"""``expertmesh.v1.Inference``. Each method is short: ask the room that knows, answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1 import inference_pb2_grpc

from cluster.gateway.auth import caller
from cluster.gateway.call import TRACE_HEADERS, Call, operation_of
from cluster.gateway.inference import Inference
from cluster.gateway.status import abort


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """``expertmesh.v1.Inference``."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """The messages of its answers, or the status with which the call ends."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if key in TRACE_HEADERS}
        call = Call("grpc", operation_of(request), caller(), context.time_remaining(), metadata)
        try:
            async with aclosing(self._inference.generate(request, call)) as messages:
                async for message in messages:
                    yield message
        except Exception as error:
            await abort(context, error)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """What is served."""
        model = self._inference.model
        sampling = model.default_sampling
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
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
            ),
        )

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        """End a running request of the caller's tenant by the client's id."""
        streams = self._inference.streams
        group = streams.find(request.request_id, caller().tenant)
        if group is not None:
            streams.abort(group)
        return pb.AbortResponse(aborted=group is not None)
