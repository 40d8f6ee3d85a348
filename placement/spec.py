"""The nouns of placement: what a node offers and what a bundle wants. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """One live machine of the cluster. ``cpus_free`` logical CPUs and ``gpus_free`` of ``gpus`` GPUs are not yet given
    to anybody."""

    node_id: str
    address: str
    cpus_free: float
    labels: Mapping[str, str] = field(default_factory=dict)
    alive: bool = True
    gpus_free: float = 0.0
    gpus: float = 0.0


@dataclass(frozen=True)
class BundleRequest:
    """Room for one shard and what lives beside it, ``actors`` together, on a node that carries ``labels``. They share
    one GPU, or this part ``gpus`` of one."""

    name: str
    cpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    gpus: float = 0.0
    actors: int = 1

    def fits(self, node: Node) -> bool:
        """True if the node is one of those that may hold it, whether or not it has room now."""
        return node.alive and all(node.labels.get(key) == value for key, value in self.labels.items())
