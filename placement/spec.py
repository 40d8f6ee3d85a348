"""The nouns of placement: what a node offers and what a bundle wants. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """One live machine of the cluster. ``cpus_free`` are logical CPUs not yet given to anybody."""

    node_id: str
    address: str
    cpus_free: float
    labels: Mapping[str, str] = field(default_factory=dict)
    alive: bool = True


@dataclass(frozen=True)
class BundleRequest:
    """Room for one shard (and what lives beside it), on a node that carries ``labels``."""

    name: str
    cpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
