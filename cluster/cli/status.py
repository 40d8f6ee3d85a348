"""``expertmesh status``: what runs where, as tables."""

from __future__ import annotations

import sys

import grpc
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2_grpc import ControlStub
from rich import box
from rich.console import Console
from rich.table import Table

from cluster.cli.client import explain, open_channel
from cluster.cli.connection import Connection
from cluster.cli.terminal import complain

_TIMEOUT_S = 15.0
_SHOWN_ID = 8
_PIPED_WIDTH = 140


def run_status(connection: Connection, experts: bool = False) -> int:
    """Print the cluster; the exit status is 1 when there is none, or an actor of it does not answer."""
    with open_channel(connection) as channel:
        try:
            view = ControlStub(channel).GetCluster(pb.GetClusterRequest(include_experts=experts), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return complain(explain(error, connection))
    print_cluster(view)
    return int(any(actor.state != pb.ACTOR_STATE_READY for actor in view.actors))


def print_cluster(view: pb.GetClusterResponse) -> None:
    """The view as rich tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    wanted = f"{view.attention_replicas_wanted} attention, {view.expert_shards_wanted} expert shard(s) wanted"
    console.print(
        f"model [bold]{view.model}[/bold]   expert map epoch [bold]{view.expert_map_epoch}[/bold]   {wanted}   "
        f"expert autoscaling {view.expert_autoscaling}"
    )
    console.print(f"transport {view.transport}", highlight=False)
    tables = [_actors(view), _rows(view), _wires(view), _nodes(view), _events(view)]
    for table in tables + ([_experts(view)] if view.layers else []):
        console.print(table)


def _actors(view: pb.GetClusterResponse) -> Table:
    table = _table("Actors", "name", "state", "node", "pid", "bundle", "weights", "load")
    for actor in view.actors:
        bundle = f"{actor.placement_group[:_SHOWN_ID]}:{actor.bundle}" if actor.placement_group else "-"
        table.add_row(
            actor.name,
            pb.ActorState.Name(actor.state).removeprefix("ACTOR_STATE_").lower(),
            actor.node_id[:_SHOWN_ID],
            str(actor.pid),
            bundle,
            f"{actor.weight_bytes / 2**20:.1f} MiB" if actor.weight_bytes else "-",
            _load(actor),
        )
    return table


def _load(actor: pb.Actor) -> str:
    match actor.WhichOneof("load"):
        case "attention":
            return _attention_load(actor.attention)
        case "router":
            router = actor.router
            waited = f"longest wait {router.longest_wait_s:.2f} s"
            return f"epoch {router.expert_map_epoch}, {router.reroutes} reroutes, {waited}"
        case "expert":
            return f"{actor.expert.experts} experts, {actor.expert.rows} rows, {actor.expert.pairs} pairs"
        case "gateway":
            door = actor.gateway
            doors = door.address + (f", http {door.http_address}" if door.http_address else "")
            return f"{doors}, {door.streams} streams, {door.requests} requests, {door.replays} replays"
        case _:
            return ""


def _attention_load(load: pb.AttentionLoad) -> str:
    """Used, cached and empty KV blocks make up all of them."""
    used, empty = load.kv_blocks - load.kv_blocks_free, load.kv_blocks_free - load.kv_blocks_cached
    told = [
        f"{load.running} running, {load.waiting} waiting, {load.preemptions} preempted so far, {load.tokens} tokens",
        f"KV blocks of {load.kv_block_size} tokens: {used} used ({load.kv_blocks_shared} shared), "
        f"{load.kv_blocks_cached} cached, {empty} empty; {load.kv_bytes / 2**20:.1f} MiB",
    ]
    if load.prefix_queried_tokens:
        share = load.prefix_hit_tokens / load.prefix_queried_tokens
        told.append(
            f"prefix cache: {load.prefix_hit_tokens} of {load.prefix_queried_tokens} tokens found ({share:.0%})"
        )
    return "\n".join(told)


def _rows(view: pb.GetClusterResponse) -> Table:
    table = _table("Rows per expert shard", "router", "shard", "rows", "share")
    for actor in view.actors:
        rows = dict(sorted(actor.router.rows_per_shard.items()))
        for shard, count in rows.items():
            table.add_row(actor.name, shard, str(count), f"{count / max(1, sum(rows.values())):.1%}")
    return table


def _wires(view: pb.GetClusterResponse) -> Table:
    table = _table("Wires", "from", "to", "medium", "sent", "received")
    for wire in view.wires:
        ends = (getattr(wire, "from"), wire.to)
        table.add_row(*ends, wire.medium, f"{wire.bytes_sent:,} B", f"{wire.bytes_received:,} B")
    return table


def _nodes(view: pb.GetClusterResponse) -> Table:
    table = _table("Nodes", "node", "address", "alive", "labels")
    for node in view.nodes:
        labels = ", ".join(f"{k}={v}" for k, v in sorted(node.labels.items()) if not k.startswith("ray.io/"))
        table.add_row(node.node_id[:_SHOWN_ID], node.address, "yes" if node.alive else "no", labels)
    return table


def _events(view: pb.GetClusterResponse) -> Table:
    table = _table("Lately", "time (UTC)", "what")
    for event in view.events:
        table.add_row(f"{event.time.ToDatetime():%H:%M:%S}", event.message)
    return table


def _experts(view: pb.GetClusterResponse) -> Table:
    table = _table("Experts", "layer", "expert", "rows", "on")
    for layer in view.layers:
        for number, expert in enumerate(layer.experts):
            table.add_row(str(layer.layer), str(number), str(expert.rows), ", ".join(expert.shards))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
