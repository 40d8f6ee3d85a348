"""How many expert shards there may be, and with how many a cluster starts. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cluster.config import AttentionConfig, ConfigError, ExpertsConfig, ServerConfig
from placement.spec import BundleRequest, Node

if TYPE_CHECKING:
    from actors.model.spec import MoEDecoderSpec


def first_count(config: ServerConfig, nodes: Iterable[Node]) -> int:
    """With how many expert shards a cluster of ``nodes`` starts: ``experts.shards``, or where that is 0 one for each
    node that may hold them, with ``device: cuda`` for each part of a GPU that is free there and that attention leaves.

    One shard uses all cores of its node, on whichever of its experts the rows need; several there each wait for the one
    that got most of them (6 of 64 experts on two shards: 3.9 of them on one). Never fewer than ``min_replicas``, and
    within the autoscaler's bounds where it is on.
    """
    experts = config.experts
    if experts.shards:
        return experts.shards
    holding = [node for node in nodes if _may_hold(node, experts)]
    count = _on_gpus(config, holding) if config.device == "cuda" else len(holding)
    if experts.autoscale.mode == "on":
        count = min(max(count, experts.autoscale.minimum), experts.autoscale.maximum)
    return max(count, experts.min_replicas)


def shard_limits(config: ServerConfig, spec: MoEDecoderSpec) -> tuple[int, int]:
    """Fewest and most expert shards: the fewest that can hold every expert as often as configured, and as many as there
    are copies of a layer's experts; with more, some would hold nothing of it."""
    experts = config.experts
    copies = spec.moe.n_experts * experts.min_replicas
    room = experts.slots and -(-len(spec.moe_layers) * copies // experts.slots)
    return max(experts.min_replicas, room), copies


def check_shards(config: ServerConfig, spec: MoEDecoderSpec, count: int) -> None:
    """Raise ConfigError when the model cannot be spread over ``count`` shards."""
    least, most = shard_limits(config, spec)
    if not least <= count <= most:
        raise ConfigError(
            f"experts.shards: {count}{'' if config.experts.shards else ' by the number of nodes'}; allowed are {least} "
            f"to {most}: the model has {spec.moe.n_experts} experts a layer, min_replicas is "
            f"{config.experts.min_replicas}" + (f", slots is {config.experts.slots}" if config.experts.slots else "")
        )


def _on_gpus(config: ServerConfig, nodes: list[Node]) -> int:
    """Where attention may be on the same nodes, each of its replicas may need a GPU that has nothing else yet."""
    free = [node.gpus_free for node in nodes]
    if math.inf in free:  # nobody counts those of one process
        return len(nodes)
    gpus = sum(map(int, free))
    if any(_may_hold(node, config.attention) for node in nodes):
        gpus = max(0, gpus - config.attention.replicas)
    return gpus * int(1 / config.experts.gpus + 1e-9)


def _may_hold(node: Node, fleet: AttentionConfig | ExpertsConfig) -> bool:
    return BundleRequest("", fleet.cpus, fleet.node_labels).fits(node) and node.cpus_free >= fleet.cpus
