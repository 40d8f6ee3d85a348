"""The expert map as a router works by it: wires to its shards, and which of them are lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from actors.dispatch import NOBODY, Owners
from actors.transport.base import Wire
from actors.transport.nccl_group import NcclGroup
from placement.expert_map import ExpertMap


class ExpertRoutes:
    """One version of the map, the wire to each of its shards, and for each pair the shard that computes it.

    Shards are numbered in the order of ``map.shards``. Used by the router's loop thread alone once it is in force.
    ``group``: what the wires run over, if that is NCCL. ``asked`` and ``answered`` count the frames to and from shards.
    """

    def __init__(self, expert_map: ExpertMap, wires: Mapping[str, Wire], group: NcclGroup | None = None) -> None:
        self.map = expert_map
        self.wires = dict(wires)
        self.group = group
        self.names = expert_map.shards
        self.asked = self.answered = 0
        self.lost: frozenset[str] = frozenset()
        self._number = {name: at for at, name in enumerate(self.names)}
        self._tables = {layer: self._table(layer, ()) for layer in expert_map.replicas}

    @property
    def epoch(self) -> int:
        """Version of the map."""
        return self.map.epoch

    def wire(self, number: int) -> Wire:
        """The wire to the shard of this number."""
        return self.wires[self.names[number]]

    def lose(self, shard: str) -> None:
        """From now on the other replicas of its experts are used. A group that is over takes all shards with it."""
        over = self.group is not None and self.group.failure is not None
        lost = frozenset(self.names) if over else self.lost | {shard}
        if lost != self.lost:
            self.lost = lost
            self._tables = {layer: self._table(layer, lost) for layer in self.map.replicas}

    def batch(self) -> AbstractContextManager[None]:
        """What is sent to shards inside leaves together, where the wires can do that."""
        return nullcontext() if self.group is None else self.group.batch()

    @property
    def quiet(self) -> bool:
        """True when the wires may be given up: nothing that a shard still sends over a group would be left untaken.

        It would hold up what that shard sends to others of the group. An answer may come to a batch long given up.
        """
        return self.group is None or bool(self.lost) or self.asked == self.answered

    def owners(self, layer: int, without: Iterable[str] = ()) -> Owners:
        """Who computes the experts of ``layer``; ``without`` shards that are not to be asked, beside those lost."""
        return self._table(layer, self.lost.union(without)) if without else self._tables[layer]

    def _table(self, layer: int, lost: Iterable[str]) -> Owners:
        gone = set(lost)
        alive = [[self._number[s] for s in shards if s not in gone] for shards in self.map.replicas[layer]]
        table = np.full((len(alive), max(1, *map(len, alive))), NOBODY, np.int64)
        for expert, numbers in enumerate(alive):
            table[expert, : len(numbers)] = numbers
        return Owners(table, np.array([len(numbers) for numbers in alive], np.int64))
