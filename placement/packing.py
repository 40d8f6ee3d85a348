"""The work sheet of the planner: which shard holds which expert while a map is being made. Arrays, no names."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WORTH = 1e-3  # a move or swap that relieves a shard by less than this share of the mean load is no improvement


@dataclass(frozen=True)
class Rooms:
    """The shards, by number. ``slots`` int64[S]: weights each may hold. ``node`` int64[S]: number of its node."""

    slots: NDArray[np.int64]
    node: NDArray[np.int64]


@dataclass(frozen=True)
class Demand:
    """What is to be packed. Expert ``x`` of the flat order is expert ``x % E`` of layer ``x // E``; N = L * E.

    ``weights`` float64[L, E] > 0: rows of each expert. ``wanted`` int64[N]: replicas of each, at most S.
    ``needed``: replicas that none may go without. ``apart``: so many of them lie on distinct nodes.
    ``home`` bool[N, S]: where its weights are in memory already.
    """

    weights: NDArray[np.float64]
    wanted: NDArray[np.int64]
    needed: int
    apart: int
    home: NDArray[np.bool_]


class Packing:
    """A map in the making. An expert's replicas share its rows equally; no shard holds an expert twice."""

    def __init__(self, demand: Demand, rooms: Rooms) -> None:
        self.layers, self.per_layer = demand.weights.shape
        n_shards = len(rooms.slots)
        self._demand = demand
        self._rooms = rooms
        self._wanted = demand.wanted.copy()
        self._weight = demand.weights.reshape(-1)
        self._share = self._weight / self._wanted
        self.held = np.zeros((self._weight.size, n_shards), dtype=np.bool_)
        self._copies = np.zeros(self._weight.size, dtype=np.int64)
        self._on_node = np.zeros((self._weight.size, int(rooms.node.max()) + 1), dtype=np.int64)
        self._used = np.zeros(n_shards, dtype=np.int64)
        self._load = np.zeros((self.layers, n_shards))
        self._mean = demand.weights.sum(1) / n_shards

    @property
    def imbalance(self) -> float:
        """Sum over layers of the busiest shard's load, over the sum of the mean loads; at least 1."""
        return float(self._load.max(1).sum() / self._mean.sum())

    def keep_homes(self) -> None:
        """Start from what is in memory already, as far as shards have room and replicas are wanted."""
        for x in np.flatnonzero(self._demand.home.any(1)).tolist():
            for s in np.flatnonzero(self._demand.home[x]).tolist():
                self._put(x, s)
            self._trim(x)
        for s in np.flatnonzero(self._used > self._rooms.slots).tolist():
            mine = np.flatnonzero(self.held[:, s])
            spare = self._copies[mine] > self._demand.needed
            too_many = max(0, self._used[s] - self._rooms.slots[s])  # trimming may have relieved it meanwhile
            for x in mine[np.lexsort((self._share[mine], ~spare))][:too_many].tolist():
                self._take(x, s)
                self._trim(x)

    def fill(self) -> None:
        """Place all replicas that are missing, heaviest first, each on the shard with the least load in its layer.

        An expert's needed replicas always find a place (the caller has checked that there are slots enough): where
        all free slots are on shards that hold it already, others make way. The rest are left out where that fails.
        """
        missing = np.repeat(np.arange(self._weight.size), np.maximum(self._wanted - self._copies, 0))
        for x in missing[np.argsort(-self._share[missing], kind="stable")].tolist():
            if self._copies[x] < self._demand.needed:
                self._place_needed(x)
            elif self._copies[x] < self._wanted[x] and not self._place(x, new_node=False, keep_apart=True):
                self._want(x, int(self._copies[x]))

    def improve(self, move_cost: float) -> None:
        """Relieve each layer's busiest shard by moves and swaps, until none relieves it by more than it costs.

        ``move_cost``: price of reading one weight that is not in memory, in rows of the layer's average expert.
        """
        for layer in range(self.layers):
            price = move_cost * float(self._demand.weights[layer].mean())
            while self._move(layer, price) or self._swap(layer, price):
                pass

    def _trim(self, x: int) -> None:
        """Take away what is too much of ``x``: second replicas on a node before first ones, and from busy shards first.

        While it is on too few nodes, places are kept free for the replicas that it needs on others.
        """
        node, load = self._rooms.node, self._load[x // self.per_layer]
        on = sorted(np.flatnonzero(self.held[x]).tolist(), key=lambda s: (load[s], self._used[s], s))
        first = {int(node[s]): s for s in reversed(on)}
        to_come = self._demand.apart - len(first)
        limit = int(self._wanted[x]) if to_come <= 0 else self._demand.needed - to_come
        keep = sorted(on, key=lambda s: first[int(node[s])] != s)[:limit]
        for s in on:
            if s not in keep:
                self._take(x, s)

    def _place_needed(self, x: int) -> None:
        """Place a replica that must be: on a new node while that can be, at the expense of others' surplus replicas."""
        for new_node, keep_apart in ((True, True), (False, True), (False, False)):
            if new_node and np.count_nonzero(self._on_node[x]) >= self._demand.apart:
                continue
            placed = self._place(x, new_node, keep_apart)
            while not placed and self._drop_surplus():
                placed = self._place(x, new_node, keep_apart)
            if placed:
                return
        raise AssertionError("the slots were counted, and yet not every needed replica finds a place")

    def _drop_surplus(self) -> bool:
        """Drop a replica nobody needs, of the expert that has the least use of it. False if there is none.

        It goes from a node with two of them, if there is one; there, from the busiest shard.
        """
        surplus = np.flatnonzero(self._copies > self._demand.needed)
        if not surplus.size:
            return False
        x = int(surplus[self._share[surplus].argmin()])
        on = np.flatnonzero(self.held[x])
        twice = self._on_node[x][self._rooms.node[on]] > 1
        on = on[twice] if twice.any() else on
        self._take(x, int(on[self._load[x // self.per_layer, on].argmax()]))
        self._want(x, int(self._copies[x]))
        return True

    def _place(self, x: int, new_node: bool, keep_apart: bool) -> bool:
        """Put one more replica of ``x`` where it weighs least, on a node without it if that can be, or must."""
        open_to = (self._used < self._rooms.slots) & ~self.held[x]
        elsewhere = open_to & (self._on_node[x][self._rooms.node] == 0)
        if elsewhere.any():
            self._put(x, self._lightest(x, elsewhere))
        elif open_to.any() and not new_node:
            self._put(x, self._lightest(x, open_to))
        else:
            return self._make_way(x, new_node, keep_apart)
        return True

    def _lightest(self, x: int, allowed: NDArray[np.bool_]) -> int:
        """The shard with the least load in the layer; of equals one that has ``x`` in memory, then the emptiest."""
        layer = x // self.per_layer
        load = np.where(allowed, self._load[layer], np.inf)
        equal = load <= load.min() + 1e-9 * self._mean[layer]
        return int(np.where(equal, np.where(self._demand.home[x], -1, self._used), np.iinfo(np.int64).max).argmin())

    def _make_way(self, x: int, new_node: bool, keep_apart: bool) -> bool:
        """Place ``x`` on a full shard whose replica moves to another, whose replica moves on, up to one with room.

        A breadth-first search for an augmenting path, as in bipartite matching: it finds a way if there is one. With
        ``new_node``, ``x`` comes to a node without it; with ``keep_apart``, the others stay on as many as they need.
        """
        starts = ~self.held[x]
        if new_node:
            starts &= self._on_node[x][self._rooms.node] == 0
        came: dict[int, tuple[int, int]] = dict.fromkeys(np.flatnonzero(starts).tolist(), (-1, x))
        queue = deque(came)
        while queue:
            s = queue.popleft()
            mine = np.flatnonzero(self.held[:, s])
            can = ~self.held[mine]
            if keep_apart:
                spare = np.count_nonzero(self._on_node[mine], axis=1) > self._demand.apart
                can &= self._may_go(mine, s) | spare[:, None]
            for t in np.flatnonzero(can.any(0)).tolist():
                if t in came:
                    continue
                came[t] = (s, int(mine[can[:, t].argmax()]))
                if self._used[t] < self._rooms.slots[t]:
                    self._pass_on(came, t)
                    return True
                queue.append(t)
        return False

    def _pass_on(self, came: dict[int, tuple[int, int]], last: int) -> None:
        while last >= 0:
            before, x = came[last]
            if before >= 0:
                self._take(x, before)
            self._put(x, last)
            last = before

    def _may_go(self, experts: NDArray[np.int64], s: int) -> NDArray[np.bool_]:
        """bool[X, S]: where each of ``experts`` may move from ``s`` without sharing a shard, nor losing a node."""
        node, on_node = self._rooms.node, self._on_node[experts]
        stays_apart = (on_node[:, node] == 0) | (node == node[s]) | (on_node[:, node[s]] > 1)[:, None]
        return ~self.held[experts] & stays_apart

    def _move(self, layer: int, price: float) -> bool:
        """Move the one expert off the layer's busiest shard that relieves it most; False if none is worth it."""
        load, busiest = self._load[layer], self._busiest(layer)
        mine = self._of_layer(layer, busiest)
        share = self._share[mine][:, None]
        gain = np.minimum(share, load[busiest] - load - share)
        allowed = self._may_go(mine, busiest) & (self._used < self._rooms.slots) & (gain > _WORTH * self._mean[layer])
        value = np.where(allowed, gain - price * self._reads(mine, busiest), -np.inf)
        if not value.size or value.max() <= 0:
            return False
        # Of equal gains the one to the emptiest shard, so that a new shard is filled from all others alike.
        equal = value >= value.max() - 1e-9 * self._mean[layer]
        tie = np.where(equal, load + 1e-6 * self._mean[layer] * self._used / self._used.max(), np.inf)
        i, t = np.unravel_index(int(tie.argmin()), tie.shape)
        self._take(int(mine[i]), busiest)
        self._put(int(mine[i]), int(t))
        return True

    def _swap(self, layer: int, price: float) -> bool:
        """Swap the two experts that relieve the layer's busiest shard most; False if no two are worth it."""
        load, node, busiest = self._load[layer], self._rooms.node, self._busiest(layer)
        mine = self._of_layer(layer, busiest)
        theirs, at = np.nonzero(self.held[layer * self.per_layer : (layer + 1) * self.per_layer])
        theirs = theirs + layer * self.per_layer
        back = ~self.held[theirs, busiest]
        theirs, at = theirs[back], at[back]
        back = (self._on_node[theirs, node[busiest]] == 0) | (node[at] == node[busiest])
        back |= self._on_node[theirs, node[at]] > 1
        theirs, at = theirs[back], at[back]
        less = self._share[mine][:, None] - self._share[theirs]
        gain = np.minimum(less, load[busiest] - load[at] - less)
        allowed = self._may_go(mine, busiest)[:, at] & (gain > _WORTH * self._mean[layer])
        read_back = self._demand.home[theirs, at].astype(np.int64) - self._demand.home[theirs, busiest]
        value = np.where(allowed, gain - price * (self._reads(mine, busiest)[:, at] + read_back), -np.inf)
        if not value.size or value.max() <= 0:
            return False
        i, j = np.unravel_index(int(value.argmax()), value.shape)
        x, y, t = int(mine[i]), int(theirs[j]), int(at[j])
        self._take(x, busiest)
        self._take(y, t)
        self._put(x, t)
        self._put(y, busiest)
        return True

    def _busiest(self, layer: int) -> int:
        """The shard with the highest load in the layer; of equals the fullest."""
        load = self._load[layer]
        return int(np.where(load >= load.max() - 1e-9 * self._mean[layer], self._used, -1).argmax())

    def _of_layer(self, layer: int, s: int) -> NDArray[np.int64]:
        start = layer * self.per_layer
        return np.flatnonzero(self.held[start : start + self.per_layer, s]) + start

    def _reads(self, experts: NDArray[np.int64], s: int) -> NDArray[np.int64]:
        """int64[X, S]: weights to be read more (or less) if each of ``experts`` is there instead of on ``s``."""
        home = self._demand.home[experts].astype(np.int64)
        return home[:, s : s + 1] - home

    def _put(self, x: int, s: int) -> None:
        self._count(x, s, 1)

    def _take(self, x: int, s: int) -> None:
        self._count(x, s, -1)

    def _count(self, x: int, s: int, by: int) -> None:
        self.held[x, s] = by > 0
        self._copies[x] += by
        self._on_node[x, self._rooms.node[s]] += by
        self._used[s] += by
        self._load[x // self.per_layer, s] += by * self._share[x]

    def _want(self, x: int, replicas: int) -> None:
        """Make do with fewer replicas of ``x``: each carries more."""
        share = self._weight[x] / replicas
        self._load[x // self.per_layer, self.held[x]] += share - self._share[x]
        self._wanted[x], self._share[x] = replicas, share
