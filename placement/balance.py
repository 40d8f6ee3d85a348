"""The planner: from loads and shards to an expert map that spreads the work evenly and moves few weights.

Greedy replication of the expert with the highest load per replica, then packing of the heaviest first, is what the
expert-parallel load balancer (EPLB) published with DeepSeek-V3 does. What it leaves out is here: weights stay where
they are unless a move is worth its price, replicas of an expert keep to distinct nodes, shards may differ in room, and
a map that is balanced already is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from placement.expert_map import ExpertMap
from placement.packing import Demand, Packing, Rooms

_UNSEEN = 0.01  # rows that each expert is taken to get besides those counted, in rows of its layer's average expert


@dataclass(frozen=True)
class ShardRoom:
    """An expert shard that may be used. ``slots``: (layer, expert) weights it may hold."""

    name: str
    node_id: str
    slots: int


@dataclass(frozen=True)
class BalancePolicy:
    """What a good map is.

    ``min_replicas``: shards that hold each expert at least, on distinct nodes as far as the nodes' room allows.
    ``extra_slots``: slots of the whole fleet that may hold further replicas; None: all that are left.
    ``move_cost``: price of reading one weight, in rows of its layer's average expert: an expert is moved only if that
    relieves the busiest shard of its layer by more.
    ``tolerance``: a map is left alone while its imbalance is at most ``1 + tolerance`` times the best found.
    """

    min_replicas: int = 1
    extra_slots: int | None = None
    move_cost: float = 0.1
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas: {self.min_replicas}; at least 1")
        if self.extra_slots is not None and self.extra_slots < 0:
            raise ValueError(f"extra_slots: {self.extra_slots}; at least 0, or None for all that are left")
        for field in ("move_cost", "tolerance"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field}: {getattr(self, field)}; at least 0, and finite")


class TooFewShards(ValueError):
    """More replicas are wanted than there are shards to hold them."""

    def __init__(self, min_replicas: int, shards: int) -> None:
        super().__init__(f"min_replicas: {min_replicas}, but there are {shards} shards, and no two share a shard")
        self.min_replicas, self.shards = min_replicas, shards


class TooFewSlots(ValueError):
    """The shards cannot hold every expert ``min_replicas`` times. ``needed`` and ``available`` are slots."""

    def __init__(self, needed: int, available: int, shards: Sequence[ShardRoom]) -> None:
        rooms = ", ".join(f"{shard.name}: {shard.slots}" for shard in shards)
        super().__init__(f"slots: {needed} needed, {available} can be used ({rooms}; no shard holds an expert twice)")
        self.needed, self.available = needed, available


def plan(
    layers: Sequence[int],
    n_experts: int,
    loads: NDArray[np.float64],
    shards: Sequence[ShardRoom],
    current: ExpertMap | None,
    policy: BalancePolicy,
    epoch: int,
) -> ExpertMap:
    """The expert map of ``epoch``: every expert of ``layers`` (ascending) on at least ``min_replicas`` of ``shards``.

    ``loads`` float64[L, E]: rows that each expert got, in any unit; a layer without any is taken to be even.
    The order of ``shards`` does not matter, and the same arguments give the same map.

    Of these maps, ordered by what they move, the first is taken whose imbalance is within the tolerance of the best:
    ``current``, if it is sound (uses all of these shards and no others, and meets the policy); ``current`` repaired by
    moves that are worth their price; the same by moves at any price; one from scratch; one from scratch without further
    replicas, if they are in the way of balance, as they can be where shards differ in room.
    Errors: TooFewShards, TooFewSlots, ValueError for what is malformed.
    """
    shards = sorted(shards, key=lambda shard: shard.name)
    _check(layers, n_experts, loads, shards, current)
    names = [shard.name for shard in shards]
    needs = _needs(loads, shards, current, policy)
    candidates: list[tuple[float, ExpertMap]] = []
    for candidate in _candidates(layers, shards, current, policy, needs, epoch):
        candidates.append((imbalance(candidate, loads, names), candidate))
        if candidates[0][0] <= 1 + policy.tolerance:
            break  # nothing is better than 1
    best = min(value for value, _ in candidates)
    return next(made for value, made in candidates if value <= best * (1 + policy.tolerance))


def imbalance(expert_map: ExpertMap, loads: NDArray[np.float64], shards: Collection[str] = ()) -> float:
    """Rows of the busiest shard over the mean of all shards, at least 1. A replica gets an equal share of its expert's.

    Layers are computed one after the other, and each waits for its own busiest shard. So it is the sum over layers of
    the highest load, over the sum of the mean loads. ``loads`` float64[L, E]: row i is the i-th layer of the map in
    ascending order; a layer without rows is taken to be even. ``shards`` are counted even if they hold nothing.
    """
    _check_loads(loads, (len(expert_map.replicas), expert_map.n_experts))
    names = sorted({*expert_map.shards, *shards})
    rows = _known(loads)
    held = _held(expert_map, names).reshape(*rows.shape, len(names))
    per_shard = np.einsum("le,les->ls", rows / held.sum(2), held)
    return float(per_shard.max(1).sum() / per_shard.mean(1).sum())


def _candidates(
    layers: Sequence[int],
    shards: Sequence[ShardRoom],
    current: ExpertMap | None,
    policy: BalancePolicy,
    needs: tuple[Demand, Rooms],
    epoch: int,
) -> Iterator[ExpertMap]:
    demand, rooms = needs
    if current is not None:
        if _is_sound(current, shards, policy, needs):
            yield replace(current, epoch=epoch)
        repaired = Packing(demand, rooms)
        repaired.keep_homes()
        repaired.fill()
        for move_cost in (policy.move_cost, 0.0):
            repaired.improve(move_cost)
            yield _as_map(repaired, layers, shards, current, epoch)
    scratch = _packed(demand, rooms)
    yield _as_map(scratch, layers, shards, current, epoch)
    if scratch.imbalance > 1 + policy.tolerance and (demand.wanted > demand.needed).any():
        fewer = _packed(replace(demand, wanted=np.full_like(demand.wanted, demand.needed)), rooms)
        yield _as_map(fewer, layers, shards, current, epoch)


def _packed(demand: Demand, rooms: Rooms) -> Packing:
    packing = Packing(demand, rooms)
    packing.fill()
    packing.improve(0.0)
    return packing


def _check(
    layers: Sequence[int],
    n_experts: int,
    loads: NDArray[np.float64],
    shards: Sequence[ShardRoom],
    current: ExpertMap | None,
) -> None:
    if not layers or any(a >= b for a, b in pairwise(layers)):
        raise ValueError(f"layers: {list(layers)}; at least one, in ascending order")
    if n_experts < 1:
        raise ValueError(f"n_experts: {n_experts}; at least 1")
    _check_loads(loads, (len(layers), n_experts))
    for shard, following in pairwise(shards):
        if shard.name == following.name:
            raise ValueError(f"shards: {shard.name!r} is given twice")
    for shard in shards:
        if shard.slots < 0:
            raise ValueError(f"shards: {shard.name!r} has {shard.slots} slots; at least 0")
    if current is not None and (current.n_experts != n_experts or sorted(current.replicas) != list(layers)):
        raise ValueError(
            f"current: {current.n_experts} experts in layers {sorted(current.replicas)}, "
            f"expected {n_experts} in {list(layers)}"
        )


def _check_loads(loads: NDArray[np.float64], shape: tuple[int, int]) -> None:
    if loads.shape != shape:
        raise ValueError(f"loads: shape {loads.shape}, expected {shape}, a row for each layer")
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"loads: {loads[~(loads >= 0) | ~np.isfinite(loads)][0]}; at least 0, and finite")


def _needs(
    loads: NDArray[np.float64], shards: Sequence[ShardRoom], current: ExpertMap | None, policy: BalancePolicy
) -> tuple[Demand, Rooms]:
    """How often each expert is wanted and where it is; what room there is. Errors: TooFewShards, TooFewSlots."""
    if policy.min_replicas > len(shards):
        raise TooFewShards(policy.min_replicas, len(shards))
    slots = np.minimum([shard.slots for shard in shards], loads.size)
    if slots.sum() < policy.min_replicas * loads.size:
        raise TooFewSlots(policy.min_replicas * loads.size, int(slots.sum()), shards)
    names, node = np.unique([shard.node_id for shard in shards], return_inverse=True)
    node_slots = np.minimum(np.bincount(node, slots), loads.size).sum()
    apart = min(policy.min_replicas, len(names), int(node_slots // loads.size))
    weights = _known(loads)
    weights = weights + _UNSEEN * weights.mean(1, keepdims=True)
    home = (
        _held(current, [shard.name for shard in shards]) if current else np.zeros((loads.size, len(shards)), np.bool_)
    )
    wanted = _replica_counts(weights.reshape(-1), home.sum(1), int(slots.sum()), len(shards), policy)
    return Demand(weights, wanted, policy.min_replicas, apart, home), Rooms(slots, node)


def _replica_counts(
    weights: NDArray[np.float64], now: NDArray[np.int64], slots: int, n_shards: int, policy: BalancePolicy
) -> NDArray[np.int64]:
    """int64[N]: ``min_replicas`` each, and one more for the expert with the highest load per replica while slots last.

    A replica that exists counts as ``1 + tolerance`` times as urgent, so that a little noise does not exchange it.
    """
    least = policy.min_replicas
    extra = slots - least * weights.size
    if policy.extra_slots is not None:
        extra = min(extra, policy.extra_slots)
    replicas = np.arange(least, n_shards)
    urgency = weights[:, None] / replicas * np.where(replicas < now[:, None], 1 + policy.tolerance, 1.0)
    chosen = np.argsort(-urgency, axis=None, kind="stable")[:extra]
    given = np.bincount(chosen // max(1, replicas.size), minlength=weights.size)
    return least + given


def _is_sound(
    current: ExpertMap, shards: Sequence[ShardRoom], policy: BalancePolicy, needs: tuple[Demand, Rooms]
) -> bool:
    """Whether the map uses exactly these shards, within their slots, with the replicas and nodes that are needed."""
    demand, rooms = needs
    if set(current.shards) != {shard.name for shard in shards if shard.slots}:
        return False
    nodes = np.stack([demand.home[:, rooms.node == n].any(1) for n in np.unique(rooms.node)], axis=1)
    return bool(
        (demand.home.sum(0) <= rooms.slots).all()
        and (demand.home.sum(1) >= policy.min_replicas).all()
        and (nodes.sum(1) >= demand.apart).all()
    )


def _known(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """``loads`` with layers that saw no rows filled evenly, as many rows as the others have on average."""
    unknown = loads.sum(1) == 0
    even = float(loads[~unknown].mean()) if not unknown.all() else 1.0
    return np.where(unknown[:, None], even, loads)


def _held(expert_map: ExpertMap, names: Sequence[str]) -> NDArray[np.bool_]:
    """bool[L * E, S]: which of the shards ``names`` holds which expert; layers ascending."""
    number = {name: n for n, name in enumerate(names)}
    held = np.zeros((len(expert_map.replicas) * expert_map.n_experts, len(names)), dtype=np.bool_)
    experts = (homes for _, layer in sorted(expert_map.replicas.items()) for homes in layer)
    for x, homes in enumerate(experts):
        for name in homes:
            if name in number:
                held[x, number[name]] = True
    return held


def _as_map(
    packing: Packing, layers: Sequence[int], shards: Sequence[ShardRoom], current: ExpertMap | None, epoch: int
) -> ExpertMap:
    """The map that was packed. An expert's replicas that stay come first, in the order they had."""
    replicas = {}
    for i, layer in enumerate(layers):
        experts = []
        for expert in range(packing.per_layer):
            on = [shards[s].name for s in np.flatnonzero(packing.held[i * packing.per_layer + expert]).tolist()]
            stay = [name for name in current.replicas[layer][expert] if name in on] if current else []
            experts.append((*stay, *(name for name in on if name not in stay)))
        replicas[layer] = tuple(experts)
    return ExpertMap(epoch=epoch, n_experts=packing.per_layer, replicas=replicas)
