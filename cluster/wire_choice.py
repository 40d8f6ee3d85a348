"""Which medium each pair of actors takes: what ``transport`` asks for, and what that comes to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.transport.base import Medium
from cluster.config import ConfigError, ServerConfig
from cluster.fleet import Bundle


@dataclass(frozen=True)
class WireChoice:
    """The choice for a cluster.

    ``medium``: of all pairwise wires; None: shm where two actors are on one node, else ``network``. ``nccl``: rows go
    over NCCL between routers and expert shards; their wires only announce them. ``why_not_nccl``: what keeps rows of
    GPUs from it, where it would have been taken.
    """

    transport: str
    medium: Medium | None
    network: Medium
    nccl: bool
    why_not_nccl: str = ""

    @property
    def rule(self) -> str:
        """For people, in one line."""
        pairwise = str(self.medium) if self.medium else f"shm on one node, {self.network} between nodes"
        if self.transport == "local":
            pairwise = "all actors are in one process"
        told = f"nccl between routers and expert shards; else {pairwise}" if self.nccl else pairwise
        return f"{self.transport}: {told}" + (f"; not nccl: {self.why_not_nccl}" if self.why_not_nccl else "")


def wire_choice(config: ServerConfig) -> WireChoice:
    """What the configuration alone decides: with ``auto`` on GPUs the nodes have a say too."""
    network = Medium.TCP if config.data_plane.tls is None else Medium.TLS
    forced = {"shm": Medium.SHM, "tcp": network}
    return WireChoice(
        config.transport, forced.get(config.transport), network, config.transport == "nccl", _not_over_nccl(config)
    )


def may_take_nccl(config: ServerConfig) -> bool:
    """True if it depends on the nodes alone whether rows go over NCCL: every router and expert shard has a GPU."""
    return config.transport == "auto" and config.device == "cuda" and not _not_over_nccl(config)


def _not_over_nccl(config: ServerConfig) -> str:
    """Why rows of GPUs do not go over NCCL though ``transport: auto`` would let them."""
    if config.transport != "auto" or config.device != "cuda":
        return ""
    for key, fleet in (("attention", config.attention), ("experts", config.experts)):
        if fleet.gpus != 1:
            return f"{key}.gpus is {fleet.gpus:g}, and NCCL's members share no GPU"
    return "" if config.data_plane.tls is None else "it does not encrypt, and data_plane.tls is set"


def refuse_far_pairs(choice: WireChoice, home: str, bundles: Sequence[Bundle]) -> None:
    """With ``transport: shm`` every pair of actors that talk must be on one node.

    Raises ConfigError naming a pair that is not: the gateway (on ``home``) and an attention shard, or a router (beside
    its attention shard) and an expert shard.
    """
    if choice.medium is not Medium.SHM:
        return
    attention = [bundle for bundle in bundles if bundle.name.startswith("attention")]
    experts = [bundle for bundle in bundles if bundle not in attention]
    pairs = [("the gateway", home, bundle) for bundle in attention]
    pairs += [(a.name.replace("attention", "router"), a.node_id, e) for a in attention for e in experts]
    for name, node, other in pairs:
        if node != other.node_id:
            raise ConfigError(
                f"transport: shm: {name} is on node {node} and {other.name} on node {other.node_id}, which share no "
                "memory; write auto or tcp, or give both fleets the node_labels of the node of serve"
            )
