"""What an operator may ask for, checked: errors that name the field, and who is meant by a drain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.attention_fleet import AttentionFleet, Replica
from cluster.expert_fleet import ExpertFleet
from cluster.fleet import Fleet
from cluster.roster import Member
from placement.spec import Node


class BadOperation(ValueError):
    """The change cannot be made. ``field`` is the request's field."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(field, description)
        self.field = field
        self.description = description

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class Busy(RuntimeError):
    """Too many changes are asked for at a time; nothing was done."""


@dataclass
class Leaving:
    """Who goes: expert shards, attention replicas; ``node`` is the id of the node that is emptied, if one is."""

    node: str = ""
    shards: list[Member] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of all actors that go."""
        pairs = [member.name for replica in self.replicas for member in replica.members]
        return pairs + [shard.name for shard in self.shards]


def find_target(actor: str, node: str, fleet: Fleet, experts: ExpertFleet, attention: AttentionFleet) -> Leaving:
    """Who is meant by a drain of ``actor``, or of ``node`` (an id, or a prefix that one node has). BadOperation."""
    if node:
        node_id = _one_node(node, fleet.nodes())
        if node_id == fleet.home():
            raise BadOperation(
                "node", f"{node_id}: the controller and the gateway run there, and end with `serve` alone"
            )
        return _on_node(node_id, experts, attention)
    if not actor:
        raise BadOperation("target", "name an attention or expert shard, or a node")
    shards = [shard for shard in experts.shards if shard.name == actor]
    replicas = [replica for replica in attention.replicas if replica.shard.name == actor]
    if not shards and not replicas:
        known = [shard.name for shard in experts.shards] + [r.shard.name for r in attention.replicas]
        raise BadOperation("actor", f"{actor!r} is no attention or expert shard; there are {', '.join(known)}")
    if shards and len(experts.shards) <= experts.least:
        raise BadOperation("actor", f"{actor}: {experts.least} expert shard(s) must stay; scale up first")
    if replicas and len(attention.replicas) == 1:
        raise BadOperation("actor", f"{actor} is the last attention shard; scale up first")
    return Leaving("", shards, replicas)


def _one_node(node: str, nodes: Sequence[Node]) -> str:
    matching = [n.node_id for n in nodes if n.alive and n.node_id.startswith(node)]
    if len(matching) != 1:
        known = ", ".join(n.node_id for n in nodes if n.alive)
        raise BadOperation("node", f"{node!r} is the id of {len(matching)} nodes, must be of one; there are {known}")
    return matching[0]


def _on_node(node: str, experts: ExpertFleet, attention: AttentionFleet) -> Leaving:
    return Leaving(
        node,
        [shard for shard in experts.shards if shard.bundle and shard.bundle.node_id == node],
        [replica for replica in attention.replicas if replica.shard.bundle and replica.shard.bundle.node_id == node],
    )
