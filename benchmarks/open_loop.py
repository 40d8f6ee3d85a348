"""Sends a load to a gateway and notes when which token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from expertmesh.v1 import control_pb2
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.control_pb2_grpc import ControlStub
from expertmesh.v1.inference_pb2_grpc import InferenceStub

from benchmarks.arrivals import Arrival

_LOOK_S = 0.5


@dataclass
class Served:
    """What became of one arrival. ``token_at`` is in seconds after the start; ``error`` is a status' name, ``details``
    what the server said with it."""

    arrival: Arrival
    token_at: list[float] = field(default_factory=list)
    cached: int = 0
    error: str = ""
    details: str = ""

    @property
    def ttft_s(self) -> float:
        """From the time at which it was due to its first token."""
        return self.token_at[0] - self.arrival.at_s

    @property
    def gaps_s(self) -> list[float]:
        """Between its tokens."""
        return [after - before for before, after in zip(self.token_at, self.token_at[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        return (self.token_at[-1] - self.token_at[0]) / max(1, len(self.token_at) - 1)


@dataclass
class Run:
    """One load, served. ``kv_use``: (seconds, share of the KV blocks in use), as it was looked at."""

    served: list[Served]
    seconds: float
    kv_use: list[tuple[float, float]]


class Gateway:
    """One channel to the gateway at ``target``."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._inference = InferenceStub(self._channel)
        self._control = ControlStub(self._channel)

    async def close(self) -> None:
        """End the channel."""
        await self._channel.close()

    async def model(self) -> pb.GetModelInfoResponse:
        """What is served."""
        return await self._inference.GetModelInfo(pb.GetModelInfoRequest())

    async def attention(self) -> list[control_pb2.AttentionLoad]:
        """The figures of every attention shard."""
        view = await self._control.GetCluster(control_pb2.GetClusterRequest())
        return [actor.attention for actor in view.actors if actor.WhichOneof("load") == "attention"]

    async def expert_rows(self) -> list[list[int]]:
        """Of each MoE layer, how many rows each expert got since the start."""
        view = await self._control.GetCluster(control_pb2.GetClusterRequest(include_experts=True))
        return [[expert.rows for expert in layer.experts] for layer in view.layers]

    async def serve(self, arrival: Arrival, began: float, served: Served | None = None) -> Served:
        """Send one request now, and note its tokens, in ``served`` as they come if it is given."""
        served = served or Served(arrival)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=arrival.prompt_ids),
            sampling=pb.SamplingParameters(temperature=0),
            stopping=pb.StoppingParameters(max_tokens=arrival.max_tokens, ignore_eos=True),
            priority=pb.PRIORITY_BATCH if arrival.batch else pb.PRIORITY_INTERACTIVE,
        )
        try:
            async for message in self._inference.Generate(request):
                served.token_at += [time.monotonic() - began] * len(message.token_ids)
                served.cached += message.started.cached_tokens
        except grpc.aio.AioRpcError as error:
            served.error, served.details = error.code().name, error.details() or ""
        return served

    async def run(self, arrivals: Sequence[Arrival]) -> Run:
        """Send every arrival at its time, whether or not those before it were answered (an open loop).

        Raises grpc.aio.AioRpcError when the cluster cannot be looked at meanwhile: then KV use is unknown.
        """
        began = time.monotonic()
        looks: list[tuple[float, float]] = []
        watch = asyncio.create_task(self._watch(began, looks))
        serving = asyncio.gather(*(self._at(arrival, began) for arrival in arrivals))
        try:
            await asyncio.wait((serving, watch), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                await watch
            return Run(await serving, time.monotonic() - began, looks)
        finally:
            serving.cancel()
            watch.cancel()
            await asyncio.gather(serving, watch, return_exceptions=True)

    async def _at(self, arrival: Arrival, began: float) -> Served:
        await asyncio.sleep(began + arrival.at_s - time.monotonic())
        return await self.serve(arrival, began)

    async def _watch(self, began: float, looks: list[tuple[float, float]]) -> None:
        while True:
            loads = await self.attention()
            used = sum(load.kv_blocks - load.kv_blocks_free for load in loads)
            looks.append((time.monotonic() - began, used / max(1, sum(load.kv_blocks for load in loads))))
            await asyncio.sleep(_LOOK_S)
