"""The cluster as a batch sees it: one channel, what is served, whether it is there, and streams of tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from enum import Enum, auto

import grpc
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from cluster.batch.errors import BatchError
from cluster.openai.errors import from_rpc_error

KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),  # else one a minute while rows only wait
)
"""A gateway whose machine is gone, or which is stopped, says nothing: ask. Gateways allow that every ten seconds. That
one is stopped was seen to be noticed after some 70 s: gRPC gives a ping of its own, sent before, a minute."""

_INFO_TIMEOUT_S = 10.0
_INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"].full_name

_TOO_LARGE = "message larger than max"
"""gRPC's own words, at either end; there is no other sign of it."""

_OF_THE_ROW = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
)
_OF_THE_CALLER = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Failure(Enum):
    """What a failed call means for the batch."""

    ROW = auto()
    """This row is refused, now and later: that is its answer."""
    CALLER = auto()
    """Every row would be refused."""
    BUSY = auto()
    """The row was not taken for want of room."""
    LOST = auto()
    """The connection broke, or there is none. The row itself may be what ends the gateway."""
    AWAY = auto()
    """The gateway is there, and says that it cannot compute for the moment."""
    ATTEMPT = auto()
    """This attempt failed; another may not."""


def judge(error: grpc.RpcError) -> Failure:
    """What ``error`` means. The gateway's own word comes with a google.rpc.Status; a proxy between, and gRPC itself,
    know the code alone (of an HTTP 404 they make UNIMPLEMENTED), and say nothing about the row."""
    code = error.code()
    if code in _OF_THE_CALLER:
        return Failure.CALLER
    hinted = from_rpc_error(error).retry_after_s is not None
    if code == grpc.StatusCode.UNAVAILABLE:
        return Failure.AWAY if hinted else Failure.LOST
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        too_large = Failure.ROW if _TOO_LARGE in (error.details() or "") else Failure.ATTEMPT
        return Failure.BUSY if hinted else too_large
    own_word = rpc_status.from_call(error) is not None
    return Failure.ROW if own_word and code in _OF_THE_ROW else Failure.ATTEMPT


class Gateway:
    """``explain`` turns a failed call into a line for people."""

    def __init__(self, channel: grpc.aio.Channel, token: str, explain: Callable[[grpc.RpcError], str]) -> None:
        # gRPC's own call credentials refuse plaintext, on loopback too
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._inference = InferenceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        self._explain = explain

    def explain(self, error: grpc.RpcError) -> str:
        """For people."""
        return self._explain(error)

    def unanswered(self, error: grpc.RpcError) -> str:
        """The same of ``model`` and the probe, which have a deadline of their own."""
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"the gateway does not answer within {_INFO_TIMEOUT_S:g} s"
        return self.explain(error)

    async def model(self) -> pb.GetModelInfoResponse:
        """What is served. Raises grpc.RpcError."""
        info: pb.GetModelInfoResponse = await self._inference.GetModelInfo(
            pb.GetModelInfoRequest(), timeout=_INFO_TIMEOUT_S, metadata=self._metadata
        )
        return info

    async def why_not_ready(self) -> str:
        """Why it cannot compute, or "" when it can. Raises BatchError when it lets this caller in no more."""
        request = health_pb2.HealthCheckRequest(service=_INFERENCE)
        try:
            health = await self._health.Check(request, timeout=_INFO_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            if judge(error) == Failure.CALLER:
                raise BatchError(self.unanswered(error)) from None
            return self.unanswered(error)
        ready = health.status == health_pb2.HealthCheckResponse.SERVING
        return "" if ready else "the gateway is there, but its cluster cannot compute"

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """The messages of one answer. Raises grpc.RpcError. What ends the iteration early frees the request."""
        call = self._inference.Generate(request, metadata=self._metadata)
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()
