"""Who is meant by a drain."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.attention_fleet import AttentionFleet, Replica
from cluster.expert_fleet import ExpertFleet
from cluster.fleet import Fleet
from cluster.refusals import BadOperation
from cluster.roster import Member


@dataclass
class Leaving:
    """Who goes: expert shards, attention replicas, spares; ``node``: the id of the node that is emptied."""

    node: str = ""
    shards: list[Member] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)
    spares: list[Member] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of all actors that go."""
        pairs = [member.name for replica in self.replicas for member in replica.members]
        return pairs + [shard.name for shard in (*self.shards, *self.spares)]


def find_target(actor: str, node: str, fleet: Fleet, experts: ExpertFleet, attention: AttentionFleet) -> Leaving:
    """Who is meant by a drain of ``actor``, or of ``node`` (see ``find_node``). BadOperation."""
    if node:
        node_id = find_node(node, fleet)
        if node_id == fleet.home():
            raise BadOperation(
                "node", f"{node_id}: the controller and the gateway run there, they end only with `expertmesh serve`"
            )
        return _on_node(node_id, experts, attention)
    if not actor:
        raise BadOperation("target", "name an attention or expert shard, or a node")
    shards = [shard for shard in experts.shards if shard.name == actor]
    replicas = [replica for replica in attention.replicas if replica.shard.name == actor]
    if not shards and not replicas:
        known = [shard.name for shard in experts.shards] + [r.shard.name for r in attention.replicas]
        raise BadOperation("actor", f"{actor!r} is no attention or expert shard; there are {', '.join(known)}")
    if shards and len(experts.living) <= experts.least:
        raise BadOperation("actor", f"{actor}: {experts.least} expert shard(s) must stay; scale up first")
    if replicas and len(attention.staying) == 1:
        raise BadOperation("actor", f"{actor} is the last attention shard; scale up first")
    return Leaving("", shards, replicas)


def find_node(node: str, fleet: Fleet) -> str:
    """The id of the node that is meant by ``node``: its id, or a prefix that no other live node has. BadOperation."""
    nodes = fleet.nodes()
    matching = [n.node_id for n in nodes if n.alive and n.node_id.startswith(node)]
    if len(matching) != 1:
        known = ", ".join(n.node_id for n in nodes if n.alive)
        begins = f"{len(matching)} nodes' ids begin" if matching else "no node's id begins"
        raise BadOperation("node", f"{begins} with {node!r}, one is needed; there are {known}")
    return matching[0]


def _on_node(node: str, experts: ExpertFleet, attention: AttentionFleet) -> Leaving:
    def there(member: Member) -> bool:
        return member.bundle is not None and member.bundle.node_id == node

    return Leaving(
        node,
        [shard for shard in experts.shards if there(shard)],
        [replica for replica in attention.replicas if there(replica.shard)],
        [spare for spare in experts.spares if there(spare)],
    )
