"""The cluster's figures as metrics: what the controller's view says, and what follows from two of them. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from expertmesh.v1 import control_pb2 as pb

ROLES = {
    pb.ROLE_CONTROLLER: "controller",
    pb.ROLE_GATEWAY: "gateway",
    pb.ROLE_ATTENTION: "attention",
    pb.ROLE_ROUTER: "router",
    pb.ROLE_EXPERT: "expert",
}
_STATES = {pb.ACTOR_STATE_READY: "ready", pb.ACTOR_STATE_UNREACHABLE: "unreachable"}


@dataclass(frozen=True)
class Metric:
    """One metric of the data plane; ``name`` as OpenTelemetry writes it, ``unit`` in UCUM."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    meaning: str


METRICS = (
    Metric("expertmesh.actors", "gauge", "{actor}", "Actors on duty, by role and by whether they answer."),
    Metric("expertmesh.shards.wanted", "gauge", "{shard}", "Expert shards, attention replicas: so many should be."),
    Metric("expertmesh.expert_map.epoch", "gauge", "{epoch}", "Version of the expert map in force."),
    Metric("expertmesh.attention.requests", "gauge", "{request}", "Requests on an attention shard, by state."),
    Metric("expertmesh.attention.kv_blocks", "gauge", "{block}", "KV blocks of an attention shard, by state."),
    Metric("expertmesh.attention.kv_blocks.shared", "gauge", "{block}", "Used KV blocks that several requests share."),
    Metric("expertmesh.attention.prefix_cache.queried", "counter", "{token}", "Tokens looked for in the prefix cache."),
    Metric("expertmesh.attention.prefix_cache.hit", "counter", "{token}", "Tokens found in the prefix cache."),
    Metric("expertmesh.attention.preemptions", "counter", "{request}", "Running requests that were sent back to wait."),
    Metric("expertmesh.attention.micro_batches", "gauge", "{batch}", "Micro-batches of the last step."),
    Metric("expertmesh.attention.steps", "counter", "{step}", "Steps that an attention shard computed."),
    Metric("expertmesh.attention.tokens", "counter", "{token}", "Tokens that an attention shard published."),
    Metric("expertmesh.attention.busy", "counter", "s", "Time in steps, waiting for experts included."),
    Metric("expertmesh.attention.experts_wait", "counter", "s", "Time in steps in which only experts were waited for."),
    Metric("expertmesh.attention.moe_batches", "counter", "{batch}", "Batches of rows sent to experts, one a layer."),
    Metric("expertmesh.attention.batch.duration", "gauge", "s", "T_a: attention's own time a batch, lately."),
    Metric("expertmesh.router.batches", "counter", "{batch}", "Batches of rows that a router completed."),
    Metric("expertmesh.router.dispatch", "counter", "s", "Time from sending a batch out to its last result."),
    Metric("expertmesh.router.combine", "counter", "s", "Time of combining results."),
    Metric(
        "expertmesh.router.reroutes", "counter", "{batch}", "Batches sent again: a shard was lost, its map changed."
    ),
    Metric("expertmesh.router.longest_wait", "gauge", "s", "Longest wait of a batch for its experts, since the start."),
    Metric("expertmesh.expert.experts", "gauge", "{expert}", "Experts (of all layers) that an expert shard holds."),
    Metric("expertmesh.expert.rows", "counter", "{row}", "Token rows that an expert shard received."),
    Metric("expertmesh.expert.pairs", "counter", "{pair}", "(row, expert) pairs that an expert shard computed."),
    Metric("expertmesh.expert.batches", "counter", "{batch}", "Batches of rows that an expert shard computed."),
    Metric("expertmesh.expert.busy", "counter", "s", "Time that an expert shard spent computing."),
    Metric("expertmesh.expert.batch.duration", "gauge", "s", "T_e: an expert shard's time a batch, lately."),
    Metric("expertmesh.expert.imbalance", "gauge", "", "Rows of the busiest expert shard over the mean."),
    Metric("expertmesh.wire.sent", "counter", "By", "Bytes that an actor sent over the data plane, by medium."),
)

Point = tuple[float, dict[str, str]]
Figures = dict[str, list[Point]]
"""Points (value, labels) by the metric's name."""


class ClusterFigures:
    """Figures of one view after the other. Labels are names of live actors and words from closed sets.

    "Lately" is since the view before: since its start for an actor that was not in it.
    """

    def __init__(self) -> None:
        self._before: dict[str, pb.Actor] = {}

    def of(self, view: pb.GetClusterResponse) -> Figures:
        """Points for every metric that has some."""
        figures: Figures = defaultdict(list)
        _whole(figures, view)
        ready = [actor for actor in view.actors if actor.state == pb.ACTOR_STATE_READY]
        for actor in ready:
            before = self._before.get(actor.name, pb.Actor())
            for medium, sent in actor.bytes_sent.items():
                figures["expertmesh.wire.sent"].append((sent, {"actor": actor.name, "medium": medium}))
            if actor.role == pb.ROLE_ATTENTION:
                _attention(figures, actor.name, actor.attention, before.attention)
            elif actor.role == pb.ROLE_ROUTER:
                _router(figures, actor.name, actor.router)
            elif actor.role == pb.ROLE_EXPERT:
                _expert(figures, actor.name, actor.expert, before.expert)
        self._imbalance(figures, [actor for actor in ready if actor.role == pb.ROLE_EXPERT])
        there = {actor.name for actor in view.actors}
        self._before = {name: actor for name, actor in self._before.items() if name in there}
        self._before |= {actor.name: actor for actor in ready}
        return dict(figures)

    def _imbalance(self, figures: Figures, shards: Iterable[pb.Actor]) -> None:
        """Over shards that hold experts: a spare is not part of it."""
        total = {shard.name: shard.expert.rows for shard in shards if shard.expert.experts}
        lately = {name: rows - self._rows_before(name) for name, rows in total.items()}
        for window, rows in (("lately", lately), ("total", total)):
            if sum(rows.values()):
                share = max(rows.values()) * len(rows) / sum(rows.values())
                figures["expertmesh.expert.imbalance"].append((share, {"window": window}))

    def _rows_before(self, name: str) -> int:
        return int(self._before[name].expert.rows) if name in self._before else 0


def _whole(figures: Figures, view: pb.GetClusterResponse) -> None:
    there = Counter((ROLES[actor.role], _STATES[actor.state]) for actor in view.actors)
    for role in ROLES.values():
        for state in _STATES.values():
            figures["expertmesh.actors"].append((there[role, state], {"role": role, "state": state}))
    figures["expertmesh.shards.wanted"] = [
        (view.expert_shards_wanted, {"role": "expert"}),
        (view.attention_replicas_wanted, {"role": "attention"}),
    ]
    figures["expertmesh.expert_map.epoch"] = [(view.expert_map_epoch, {})]


def _attention(figures: Figures, name: str, load: pb.AttentionLoad, before: pb.AttentionLoad) -> None:
    shard = {"shard": name}
    figures["expertmesh.attention.requests"] += [
        (load.running, {**shard, "state": "running"}),
        (load.waiting, {**shard, "state": "waiting"}),
    ]
    figures["expertmesh.attention.kv_blocks"] += [
        (load.kv_blocks - load.kv_blocks_free, {**shard, "state": "used"}),
        (load.kv_blocks_cached, {**shard, "state": "cached"}),
        (load.kv_blocks_free - load.kv_blocks_cached, {**shard, "state": "free"}),
    ]
    figures["expertmesh.attention.kv_blocks.shared"].append((load.kv_blocks_shared, shard))
    figures["expertmesh.attention.prefix_cache.queried"].append((load.prefix_queried_tokens, shard))
    figures["expertmesh.attention.prefix_cache.hit"].append((load.prefix_hit_tokens, shard))
    figures["expertmesh.attention.preemptions"].append((load.preemptions, shard))
    figures["expertmesh.attention.micro_batches"].append((load.micro_batches, shard))
    figures["expertmesh.attention.steps"].append((load.steps, shard))
    figures["expertmesh.attention.tokens"].append((load.tokens, shard))
    figures["expertmesh.attention.busy"].append((load.busy_s, shard))
    figures["expertmesh.attention.experts_wait"].append((load.experts_wait_s, shard))
    figures["expertmesh.attention.moe_batches"].append((load.moe_batches, shard))
    if batches := load.moe_batches - before.moe_batches:
        own_s = (load.busy_s - load.experts_wait_s) - (before.busy_s - before.experts_wait_s)
        figures["expertmesh.attention.batch.duration"].append((own_s / batches, shard))


def _router(figures: Figures, name: str, load: pb.RouterLoad) -> None:
    router = {"router": name}
    figures["expertmesh.router.batches"].append((load.batches, router))
    figures["expertmesh.router.dispatch"].append((load.dispatch_s, router))
    figures["expertmesh.router.combine"].append((load.combine_s, router))
    figures["expertmesh.router.reroutes"].append((load.reroutes, router))
    figures["expertmesh.router.longest_wait"].append((load.longest_wait_s, router))


def _expert(figures: Figures, name: str, load: pb.ExpertLoad, before: pb.ExpertLoad) -> None:
    shard = {"shard": name}
    figures["expertmesh.expert.experts"].append((load.experts, shard))
    figures["expertmesh.expert.rows"].append((load.rows, shard))
    figures["expertmesh.expert.pairs"].append((load.pairs, shard))
    figures["expertmesh.expert.batches"].append((load.batches, shard))
    figures["expertmesh.expert.busy"].append((load.busy_s, shard))
    if batches := load.batches - before.batches:
        figures["expertmesh.expert.batch.duration"].append(((load.busy_s - before.busy_s) / batches, shard))
