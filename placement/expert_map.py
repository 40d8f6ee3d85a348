"""The expert map: which shards hold which (layer, expert), under which epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

Expert = tuple[int, int]
"""(layer, expert): the layer's index in the model, the expert's index in the layer."""


@dataclass(frozen=True)
class ExpertMap:
    """One version of the map. Immutable; a change is a new map with a higher ``epoch``.

    ``replicas`` gives for each MoE layer, for each expert, the names of the shards that hold it, never none.
    """

    epoch: int
    n_experts: int
    replicas: Mapping[int, tuple[tuple[str, ...], ...]]

    def __post_init__(self) -> None:
        if self.epoch < 1:
            raise ValueError(f"epoch: {self.epoch}; epochs start at 1")
        for layer, experts in self.replicas.items():
            if len(experts) != self.n_experts:
                raise ValueError(f"layer {layer}: {len(experts)} experts, expected {self.n_experts}")
            for expert, shards in enumerate(experts):
                if not shards:
                    raise ValueError(f"layer {layer}, expert {expert}: no shard holds it")
                if len(set(shards)) != len(shards):
                    raise ValueError(f"layer {layer}, expert {expert}: two replicas on one shard: {shards}")

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """Names of all shards that hold anything, sorted."""
        return tuple(sorted({s for experts in self.replicas.values() for shards in experts for s in shards}))

    def held_by(self, shard: str) -> tuple[Expert, ...]:
        """What ``shard`` holds, in (layer, expert) order."""
        return tuple(
            (layer, expert)
            for layer, experts in sorted(self.replicas.items())
            for expert, shards in enumerate(experts)
            if shard in shards
        )

    def homes(self, layer: int) -> tuple[str, ...]:
        """First replica of each expert of ``layer``."""
        return tuple(shards[0] for shards in self.replicas[layer])


def single_replica_map(epoch: int, layers: Iterable[int], n_experts: int, shards: tuple[str, ...]) -> ExpertMap:
    """Every expert once, the same number (give or take one) of each layer's experts on each shard.

    Experts go round robin, and each layer starts one shard further, so that a remainder does not pile up on the
    first shard. No more shards than experts of a layer make sense: the rest would hold nothing in some layers.
    """
    if not shards:
        raise ValueError("shards: none given")
    replicas = {
        layer: tuple((shards[(expert + turn) % len(shards)],) for expert in range(n_experts))
        for turn, layer in enumerate(layers)
    }
    return ExpertMap(epoch=epoch, n_experts=n_experts, replicas=replicas)
