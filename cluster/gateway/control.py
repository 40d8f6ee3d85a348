"""``expertmesh.v1.Control``: what an operator asks, passed on to the controller."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import control_pb2_grpc

from cluster.calls import log_failure
from cluster.fleet import ActorHandle, ActorUnreachable
from cluster.gateway.errors import (
    CHANGES_WAITING,
    CONTROLLER_DOWN,
    DRAINING,
    FailedPrecondition,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from cluster.gateway.status import abort
from cluster.gateway.watch import ClusterWatch
from cluster.refusals import BadOperation, Busy, ChangeFailed, TraceRunning
from cluster.roster import Stopping
from placement.bundles import NoRoom

_VIEW_TIMEOUT_S = 10.0


class ControlService(control_pb2_grpc.ControlServicer):
    """Each method asks the controller, whose answers are serialised messages. A change is carried out to its end even
    if the caller goes away meanwhile."""

    def __init__(self, controller: ActorHandle) -> None:
        self._controller = controller
        self._watch = ClusterWatch(controller)

    async def GetCluster(
        self, request: pb.GetClusterRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetClusterResponse:
        """What runs where."""
        call = self._ask(context, "view", request.include_experts)
        try:
            return pb.GetClusterResponse.FromString(await asyncio.wait_for(call, _VIEW_TIMEOUT_S))
        except TimeoutError as error:
            await _abort(context, error)

    async def WatchCluster(
        self, request: pb.WatchClusterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchClusterResponse]:
        """Events, as they come."""
        try:
            async for event in self._watch.follow(request.after):
                yield pb.WatchClusterResponse(event=event)
        except Exception as error:
            await _abort(context, error)

    async def ScaleExperts(
        self, request: pb.ScaleExpertsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScaleExpertsResponse:
        """Another number of expert shards."""
        return pb.ScaleExpertsResponse.FromString(await self._ask(context, "scale_experts", request.shards))

    async def ScaleAttention(
        self, request: pb.ScaleAttentionRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScaleAttentionResponse:
        """Another number of attention replicas."""
        return pb.ScaleAttentionResponse.FromString(await self._ask(context, "scale_attention", request.replicas))

    async def Rebalance(self, request: pb.RebalanceRequest, context: grpc.aio.ServicerContext) -> pb.RebalanceResponse:
        """The experts spread anew by the load that was counted."""
        return pb.RebalanceResponse.FromString(await self._ask(context, "rebalance"))

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        """A shard, or a node, out of service."""
        return pb.DrainResponse.FromString(await self._ask(context, "drain", request.actor, request.node, request.undo))

    async def Trace(self, request: pb.TraceRequest, context: grpc.aio.ServicerContext) -> pb.TraceResponse:
        """Some steps of every actor. Unlike a change it ends with its caller."""
        caller = uuid.uuid4().hex
        try:
            answer = await self._ask(context, "trace", request.steps, request.timeout_s, caller)
        except asyncio.CancelledError:
            self._controller.begin("stop_trace", caller).add_done_callback(log_failure)
            raise
        return pb.TraceResponse.FromString(answer)

    def close(self) -> None:
        """The gateway ends."""
        self._watch.close()

    async def _ask(self, context: grpc.aio.ServicerContext, method: str, *arguments: Any) -> bytes:
        try:
            # shielded: what was asked is carried out, whether or not somebody waits for the answer
            call = asyncio.wrap_future(self._controller.begin(method, *arguments))
            answer: bytes = await asyncio.shield(call)
            return answer
        except Exception as error:
            await _abort(context, error)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End the call with the controller's error in the words of the service."""
    match error:
        case BadOperation():
            await abort(context, InvalidRequest(error.field, error.description))
        case NoRoom():
            await abort(context, FailedPrecondition(str(error), "NO_ROOM"))
        case ChangeFailed():
            await abort(context, FailedPrecondition(str(error), "CHANGE_FAILED"))
        case TraceRunning():
            await abort(context, FailedPrecondition(str(error), "TRACE_RUNNING"))
        case Busy():
            await abort(context, Overloaded(CHANGES_WAITING))
        case Stopping():
            await abort(context, Unavailable(DRAINING))
        case ActorUnreachable() | TimeoutError():
            await abort(context, Unavailable(CONTROLLER_DOWN))
    await abort(context, error)
