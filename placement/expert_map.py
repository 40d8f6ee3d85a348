"""The expert map: which shards hold which (layer, expert), under which epoch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
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


class NoHome(ValueError):
    """A map would leave experts without any shard. ``experts`` names them, in (layer, expert) order."""

    def __init__(self, experts: tuple[Expert, ...], gone: Collection[str]) -> None:
        shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:8])
        more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
        super().__init__(f"without {', '.join(sorted(gone))} no shard holds {shown}{more}")
        self.experts = experts


def held_only_by(expert_map: ExpertMap, shards: Collection[str]) -> tuple[Expert, ...]:
    """The experts whose replicas are all on ``shards`` (a node's, say), in (layer, expert) order: lost if those are."""
    return tuple(
        (layer, expert)
        for layer, experts in sorted(expert_map.replicas.items())
        for expert, homes in enumerate(experts)
        if all(home in shards for home in homes)
    )


def without(expert_map: ExpertMap, lost: Collection[str], epoch: int) -> ExpertMap:
    """The map without the shards ``lost``; names that hold nothing are fine. Errors: NoHome."""
    orphans = held_only_by(expert_map, lost)
    if orphans:
        raise NoHome(orphans, lost)
    return _renamed(expert_map, epoch, lambda shards: tuple(s for s in shards if s not in lost))


def replaced(expert_map: ExpertMap, old: str, new: str, epoch: int) -> ExpertMap:
    """The map with shard ``new`` in place of ``old``. Errors: ValueError when ``old`` is not in it, or ``new`` is."""
    if old not in expert_map.shards:
        raise ValueError(f"old: {old!r} is not in the map; its shards: {', '.join(expert_map.shards)}")
    if new in expert_map.shards:
        raise ValueError(f"new: {new!r} is in the map already")
    return _renamed(expert_map, epoch, lambda shards: tuple(new if s == old else s for s in shards))


def moves(old: ExpertMap | None, new: ExpertMap) -> dict[str, tuple[Expert, ...]]:
    """What each shard must read to go from ``old`` (None: from nothing) to ``new``, in (layer, expert) order.

    Shards that need nothing are left out. ``moves(new, old)`` is what each shard may let go afterwards.
    """
    reads: dict[str, list[Expert]] = {}
    for layer, experts in sorted(new.replicas.items()):
        before = old.replicas.get(layer, ()) if old else ()
        for expert, shards in enumerate(experts):
            had = before[expert] if expert < len(before) else ()
            for shard in shards:
                if shard not in had:
                    reads.setdefault(shard, []).append((layer, expert))
    return {shard: tuple(reads[shard]) for shard in sorted(reads)}


def _renamed(expert_map: ExpertMap, epoch: int, change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> ExpertMap:
    replicas = {layer: tuple(map(change, experts)) for layer, experts in expert_map.replicas.items()}
    return ExpertMap(epoch=epoch, n_experts=expert_map.n_experts, replicas=replicas)
