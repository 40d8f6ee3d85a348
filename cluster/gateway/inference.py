"""One request from its validation to its last message, whichever door it came through."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from expertmesh.v1 import inference_pb2 as pb

from cluster.access import Caller
from cluster.gateway.answer import Answer
from cluster.gateway.served_model import ServedModel
from cluster.gateway.stream import Stream, Watch
from cluster.gateway.streams import Streams
from cluster.gateway.validation import validate
from cluster.telemetry.request import RequestObserver

TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C Trace Context, as gRPC metadata or HTTP headers."""


Operation = Literal["chat", "text_completion"]
"""As OpenTelemetry's conventions for generative AI name them."""


@dataclass(frozen=True)
class Call:
    """What a door knows of a request beside its message.

    ``timeout_s``: what is left of the client's deadline, None without one.
    ``trace``: those of TRACE_HEADERS that the client sent.
    ``default_max_tokens``: the message's ``max_tokens`` is the door's, and not the client's: see ``validate``.
    """

    door: Literal["grpc", "http"]
    operation: Operation
    caller: Caller
    timeout_s: float | None = None
    trace: Mapping[str, str] = field(default_factory=dict)
    default_max_tokens: bool = False


def operation_of(request: pb.GenerateRequest) -> Operation:
    """What a request asks for."""
    return "chat" if request.HasField("messages") else "text_completion"


class Inference:
    """What every door offers of the model; each door turns the messages and errors into its own protocol."""

    def __init__(self, model: ServedModel, streams: Streams, observer: RequestObserver) -> None:
        self.model = model
        self.streams = streams
        self._observer = observer
        self.requests = 0

    async def generate(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse]:
        """Validate, admit, and stream until the answer is finished. Whatever ends the call, also a caller that closes
        the iterator or is cancelled, frees the request.

        Raises the ServiceError with which the call has to end.
        """
        self.requests += 1
        now = asyncio.get_running_loop().time
        deadline = math.inf if call.timeout_s is None else now() + call.timeout_s
        tenant = call.caller.tenant
        stream: Stream | None = None
        with self._observer.begin(request, call.door, call.operation, tenant, call.trace) as observed:
            try:
                # rendering and tokenising a long prompt takes time: not in the loop that serves every other stream
                cut = call.default_max_tokens
                valid = await asyncio.to_thread(validate, request, self.model, cut_max_tokens=cut)
                observed.validated(valid)
                watch = Watch(observed.traceparent, observed.arrived)
                left = None if call.timeout_s is None else deadline - now()
                stream = await self.streams.open(valid, left, tenant, watch)
                answer = Answer(valid, self.model)
                while not answer.finished:
                    for message in answer.push(await self.streams.next_events(stream)):
                        observed.sent(message)
                        yield message
            finally:
                if stream is not None:
                    self.streams.close(stream)
