"""The cluster as it is now, as the message that ``Control/GetCluster`` returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from expertmesh.v1 import control_pb2 as pb

from cluster.calls import answers
from cluster.fleet import Fleet
from cluster.roster import Member


def cluster_view(model: str, epoch: int, fleet: Fleet, members: Sequence[Member]) -> pb.GetClusterResponse:
    """Ask every member for its figures at the same time; one that does not answer soon is UNREACHABLE."""
    view = pb.GetClusterResponse(model=model, expert_map_epoch=epoch)
    for node in fleet.nodes():
        view.nodes.add(node_id=node.node_id, address=node.address, alive=node.alive, labels=dict(node.labels))
    view.actors.add(
        name="controller",
        role=pb.ROLE_CONTROLLER,
        state=pb.ACTOR_STATE_READY,
        node_id=fleet.home(),
        pid=os.getpid(),
    )
    told = answers({member.name: member.handle.begin("stats") for member in members})
    for member in members:
        actor = view.actors.add(name=member.handle.name, role=member.role, node_id=fleet.node_id(member.handle))
        if member.bundle is not None:
            actor.placement_group, actor.bundle = member.bundle.group, member.bundle.index
        _fill(view, actor, told.get(member.name))
    return view


def _fill(view: pb.GetClusterResponse, actor: pb.Actor, stats: Any) -> None:
    if stats is None:
        actor.state = pb.ACTOR_STATE_UNREACHABLE
        return
    actor.state = pb.ACTOR_STATE_READY
    actor.pid = stats.pid
    _LOADS[actor.role](actor, stats)
    actor.bytes_sent.update(getattr(stats, "bytes_sent", {}))
    for wire in getattr(stats, "wires", ()):
        pair = {"from": actor.name, "to": wire.peer}
        view.wires.add(**pair, medium=wire.medium, bytes_sent=wire.bytes_sent, bytes_received=wire.bytes_received)


def _attention(actor: pb.Actor, stats: Any) -> None:
    actor.weight_bytes = stats.weight_bytes
    for field in pb.AttentionLoad.DESCRIPTOR.fields:
        setattr(actor.attention, field.name, getattr(stats, field.name))


def _router(actor: pb.Actor, stats: Any) -> None:
    actor.weight_bytes = stats.weight_bytes
    actor.router.expert_map_epoch = stats.epoch
    actor.router.rows_per_shard.update(stats.rows_per_shard)
    actor.router.reroutes, actor.router.longest_wait_s = stats.reroutes, stats.longest_wait_s
    actor.router.batches, actor.router.dispatch_s, actor.router.combine_s = (
        stats.batches,
        stats.dispatch_s,
        stats.combine_s,
    )


def _expert(actor: pb.Actor, stats: Any) -> None:
    actor.weight_bytes = stats.weight_bytes
    load = actor.expert
    load.expert_map_epoch, load.experts = stats.epoch, stats.experts
    load.rows, load.pairs, load.busy_s, load.batches = stats.rows, stats.pairs, stats.busy_s, stats.batches


def _gateway(actor: pb.Actor, stats: Any) -> None:
    load = actor.gateway
    load.address, load.http_address = stats.doors.grpc, stats.doors.http
    load.streams, load.requests = stats.streams, stats.requests
    load.replays = stats.replays


_LOADS = {
    pb.ROLE_ATTENTION: _attention,
    pb.ROLE_ROUTER: _router,
    pb.ROLE_EXPERT: _expert,
    pb.ROLE_GATEWAY: _gateway,
}
