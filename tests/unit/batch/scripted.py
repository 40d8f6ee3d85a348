"""A gateway that does what a test tells it, and time that passes only when somebody sleeps or a script says so."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import grpc
from expertmesh.v1 import inference_pb2 as pb
from grpc.aio import AioRpcError, Metadata
from grpc_status import rpc_status

from cluster.batch.gateway import Gateway
from cluster.gateway.errors import ServiceError
from cluster.gateway.status import to_status

INFO = pb.GetModelInfoResponse(model="tiny")


def lost(details: str = "Socket closed") -> AioRpcError:
    """What gRPC itself says of a connection that broke."""
    return AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), details)


def bare(code: grpc.StatusCode, details: str = "bare") -> AioRpcError:
    """A status of which gRPC itself, or a proxy, tells no more."""
    return AioRpcError(code, Metadata(), Metadata(), details)


def refusal(error: ServiceError) -> AioRpcError:
    """What the gateway's service makes of ``error``."""
    status = rpc_status.to_status(to_status(error))
    trailing = Metadata(*((key, value) for key, value in status.trailing_metadata))
    return AioRpcError(status.code, Metadata(), trailing, status.details)


def messages(
    tokens: Iterable[int], first: int = 0, model: str = "tiny", end: bool = True, choice: int = 0
) -> list[pb.GenerateResponse]:
    """A stream from index ``first`` on: each token's text is its number."""
    made = [pb.GenerateResponse(request_id="id", next_index=first, started=pb.Started(model=model, prompt_tokens=3))]
    index = first
    for token in tokens:
        index += 1
        made.append(
            pb.GenerateResponse(request_id="id", next_index=index, token_ids=[token], text=f"{token} ", choice=choice)
        )
    if end:
        usage = pb.Usage(prompt_tokens=3, completion_tokens=index)
        finished = pb.Finished(reason=pb.FINISH_REASON_LENGTH, usage=usage)
        made.append(pb.GenerateResponse(request_id="id", next_index=index, finished=finished, choice=choice))
    return made


class ScriptedGateway(Gateway):
    """``streams``: what each call of Generate gives, messages, things to do between, and perhaps an error.
    ``troubles``: what each probe finds; ready when there are no more."""

    def __init__(self, *streams: list[Any]) -> None:
        self.streams = deque(streams)
        self.troubles: deque[str] = deque()
        self.info = INFO
        self.requests: list[pb.GenerateRequest] = []

    def explain(self, error: grpc.RpcError) -> str:
        """See Gateway."""
        return f"{error.code().name}: {error.details()}"

    async def model(self) -> pb.GetModelInfoResponse:
        """See Gateway."""
        return self.info

    async def why_not_ready(self) -> str:
        """See Gateway."""
        return self.troubles.popleft() if self.troubles else ""

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """See Gateway."""
        kept = pb.GenerateRequest()
        kept.CopyFrom(request)
        self.requests.append(kept)
        for item in self.streams.popleft():
            if isinstance(item, BaseException):
                raise item
            if callable(item):
                item()
                continue
            yield item


class Time:
    """Seconds that tests own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Callable[[], None]:
        """For a script: something that takes so long."""

        def pass_by() -> None:
            self.now += seconds

        return pass_by

    async def sleep(self, seconds: float) -> None:
        """Passes at once, though others may do something meanwhile."""
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)
