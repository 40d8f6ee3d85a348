"""One request from its validation to its last message, whichever door it came through."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from functools import partial

from expertmesh.v1 import inference_pb2 as pb

from cluster.gateway.answers import Answers
from cluster.gateway.arrivals import Arrivals
from cluster.gateway.call import Call
from cluster.gateway.group import StreamGroup
from cluster.gateway.off_loop import by_size
from cluster.gateway.served_model import ServedModel
from cluster.gateway.stream import Watch
from cluster.gateway.streams import Streams
from cluster.gateway.validation import is_request_id, random_request_id, validate
from cluster.telemetry.request import RequestObserver


class Inference:
    """What every door offers of the model; each door turns the messages and errors into its own protocol."""

    def __init__(self, model: ServedModel, streams: Streams, observer: RequestObserver) -> None:
        self.model = model
        self.streams = streams
        self._observer = observer
        self.requests = 0

    async def generate(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse]:
        """Validate, admit, and stream until all answers are finished. Whatever ends the call, also a caller that closes
        the iterator or is cancelled, frees the request.

        Raises the ServiceError with which the call has to end.
        """
        self.requests += 1
        now = asyncio.get_running_loop().time
        deadline = math.inf if call.timeout_s is None else now() + call.timeout_s
        # known before it is found valid, so that the record of a refusal has it as well
        request_id = request.request_id if is_request_id(request.request_id) else random_request_id()
        check = partial(validate, draw_request_id=lambda: request_id, cut_max_tokens=call.default_max_tokens)
        group: StreamGroup | None = None
        with self._observer.begin(request, request_id, call) as observed:
            try:
                # rendering and tokenising a long prompt takes time: not in the loop that serves every other stream
                valid = await asyncio.to_thread(check, request, self.model)
                observed.validated(valid)
                watch = Watch(observed.traceparent, observed.arrived)
                left = None if call.timeout_s is None else deadline - now()
                group = await self.streams.open(valid, left, call.caller, watch)
                answers = Answers(valid, self.model)
                async with Arrivals(self.streams, group) as arrivals:
                    while not answers.finished:
                        choice, events = await arrivals.next()
                        entries = valid.prompt_entries if any(event.prompt_logprobs for event in events) else 0
                        messages = await by_size(entries, answers.push, choice, events)
                        if answers.ended(choice):
                            arrivals.stop(choice)
                        for message in messages:
                            observed.sent(message)
                            yield message
            finally:
                if group is not None:
                    self.streams.close(group)
