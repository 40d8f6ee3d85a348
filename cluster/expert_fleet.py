"""ExpertFleet: which expert shards there are, and which experts they hold. ``expert_maps.py`` says how maps change."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2 import Role
from numpy.typing import NDArray

from actors.model.spec import MoEDecoderSpec
from actors.stats import ExpertStats
from actors.transport.base import Address
from cluster.actor_class import EXPERT_SHARD
from cluster.calls import answers, results
from cluster.deployment import PROCESS_START_S, Deployment, left
from cluster.expert_maps import ExpertMaps, Routers
from cluster.fleet import Bundle
from cluster.roster import Member
from cluster.shard_counts import shard_limits
from placement.balance import BalancePolicy, ShardRoom, imbalance, plan
from placement.expert_map import ExpertMap, replaced
from placement.spec import BundleRequest


class ExpertFleet:
    """The expert shards of a cluster, from ``least`` to ``most``. One thread at a time changes it.

    ``spec`` says which experts there are; ``routers`` gives the routers that work by the map now.
    """

    def __init__(self, deployment: Deployment, spec: MoEDecoderSpec, routers: Routers) -> None:
        self._deployment = deployment
        self._config = deployment.config.experts
        self._spec = spec
        self._routers = routers
        self._maps = ExpertMaps(deployment, routers)
        self.least, self.most = shard_limits(deployment.config, spec)
        self._shards: dict[str, Member] = {}
        self._spares: dict[str, Member] = {}
        self._addresses: dict[str, Address] = {}
        self._counted: dict[str, dict[int, NDArray[np.int64]]] = {}

    @property
    def map(self) -> ExpertMap | None:
        """The map in force."""
        return self._maps.in_force

    @property
    def shards(self) -> list[Member]:
        """The shards of the map, oldest first; those that died and are being replaced among them."""
        return list(self._shards.values())

    @property
    def living(self) -> list[Member]:
        """The shards of the map that are not known to be dead."""
        return [shard for shard in self.shards if self._deployment.roster.find(shard.name) is shard]

    @property
    def wanted(self) -> int:
        """How many there are to be."""
        return len(self._shards)

    # -- start ----------------------------------------------------------------------------------------------------

    def spawn(self, bundles: Sequence[Bundle], deadline: float) -> list[Member]:
        """One shard per bundle, named as the bundle. They hold nothing yet. If that fails, nothing of it is left, the
        bundles neither."""
        spawned: list[Member] = []
        try:
            beside = [shard.bundle for shard in self.living if shard.bundle] + list(bundles)  # not whom it replaces
            settings = self._deployment.settings([bundle.node_id for bundle in bundles], deadline)
            for bundle in bundles:
                own = settings.expert(bundle, beside)
                spawned.append(self._deployment.roster.spawn(Role.ROLE_EXPERT, EXPERT_SHARD, bundle.name, bundle, own))
        except BaseException:
            self.dismiss(spawned)
            for bundle in bundles:
                self._deployment.release(bundle)
            raise
        return spawned

    def begin(self, shards: list[Member], deadline: float) -> list[Future[Any]]:
        """Make the first map over ``shards`` and let them read, each as soon as it is up; the futures end when they
        have."""
        new = self.plan(shards)
        loads = [s.handle.begin("load", new.epoch, new.held_by(s.name)) for s in shards]
        self._shards = {shard.name: shard for shard in self.listening(shards, deadline)}
        self._maps.in_force = new
        return loads

    def start(self, bundles: Sequence[Bundle], deadline: float) -> list[Member]:
        """Shards that listen and hold nothing. All or none; any thread."""
        return self.listening(self.spawn(bundles, deadline), deadline)

    def listening(self, spawned: list[Member], deadline: float) -> list[Member]:
        """Wait until they are up, and note their addresses; all or none."""
        try:
            soon = min(deadline, time.monotonic() + PROCESS_START_S)
            self._addresses.update(results({s.name: s.handle.begin("listen") for s in spawned}, soon))
        except BaseException:
            self.dismiss(spawned)
            raise
        return spawned

    def introduce(self, routers: Sequence[Member], deadline: float) -> int:
        """Bring new routers to the map in force, or with all the others to a new one; returns its epoch."""
        return self._maps.introduce(routers, self._shards, self._addresses, deadline)

    def part_with(self, routers: Sequence[Member], deadline: float) -> None:
        """These routers go, or are gone."""
        self._maps.part_with(routers, self._shards, self._addresses, deadline)

    # -- changes --------------------------------------------------------------------------------------------------

    def plan(self, shards: Sequence[Member]) -> ExpertMap:
        """The best map over ``shards`` by the counted load. Any thread."""
        layers, n_experts = self._spec.moe_layers, self._spec.moe.n_experts
        least = len(layers) * -(-n_experts * self._config.min_replicas // len(shards))
        rooms = [
            ShardRoom(shard.name, shard.bundle.node_id if shard.bundle else "", self._config.slots or least)
            for shard in shards
        ]
        extra = None if self._config.slots else 0
        policy = BalancePolicy(min_replicas=self._config.min_replicas, extra_slots=extra)
        return plan(layers, n_experts, self.loads(), rooms, self.map, policy, self._maps.next_epoch())

    def read_ahead(self, new: ExpertMap, started: Sequence[Member], deadline: float) -> None:
        """Let shards read what ``new`` will give them, while the map in force may still change. Any thread."""
        try:
            self._maps.read(new, {**self._shards, **_by_name(started)}, deadline)
        except BaseException:
            self._maps.forget_read(new.epoch, self._shards)
            raise

    def change(self, new: ExpertMap, started: Sequence[Member], deadline: float) -> int:
        """Bring ``new`` into force, over some of the shards and the ``started`` ones; who is not in it goes.

        Returns how many experts were read for it. On failure the old map stays; the started ones are the caller's.
        """
        shards = {**self._shards, **_by_name(started)}
        read = self._maps.install(new, shards, self._addresses, deadline)
        leaving = [shard for name, shard in shards.items() if name not in new.shards]
        self._shards = {name: shard for name, shard in shards.items() if name in new.shards}
        self._counted = self._count()
        self.dismiss(leaving)
        return read

    def rebalance(self, deadline: float) -> tuple[int, float, float]:
        """Spread the experts over the same shards by the load that was counted.

        Returns how many experts were read, and the imbalance by that load before and after.
        """
        assert self.map is not None
        old, loads = self.map, self.loads()
        new = self.plan(self.shards)
        read = self.change(new, [], deadline) if new.replicas != old.replicas else 0
        return read, imbalance(old, loads), imbalance(self.map, loads)

    def replace(self, lost: Sequence[Member], deadline: float) -> None:
        """Start a shard for each one that died, with the same experts.

        Where its room is still there it is used again. Until it has worked, it may be called again.
        """
        dead = {member.name: member for member in lost if member.name in self._shards}
        if not dead:
            return
        started: list[Member] = []
        try:
            new = self._maps.again()
            for member in dead.values():
                started.append(self._newcomer(member, deadline))
                new = replaced(new, member.name, started[-1].name, new.epoch)
            self.change(new, started, deadline)
        except BaseException:
            self.dismiss(started)
            raise

    def reconnect(self, deadline: float) -> None:
        """Let every router connect anew to shards that it has lost though they live."""
        self.change(self._maps.again(), [], deadline)

    def missed(self) -> frozenset[str]:
        """Shards that some router has lost and has not got back."""
        calls = {router.name: router.handle.begin("wait_for_loss", 0, frozenset(), 0.0) for router in self._routers()}
        return frozenset[str]().union(*(lost for _, lost in answers(calls).values()))

    def dismiss(self, shards: Iterable[Member]) -> None:
        """End shards that are in no map, and give their rooms back."""
        for shard in shards:
            self._spares.pop(shard.name, None)
            self._addresses.pop(shard.name, None)
            self._deployment.roster.end(shard)
            self._deployment.release(shard.bundle)

    # -- spares ---------------------------------------------------------------------------------------------------

    @property
    def spares(self) -> list[Member]:
        """Warm processes without experts."""
        return list(self._spares.values())

    def restore_spares(self, room_s: float, deadline: float) -> None:
        """Start spares until there are as many as configured, waiting ``room_s`` seconds for room. Any thread."""
        missing = self._config.spares - len(self._spares)
        if missing > 0:
            bundles = self._deployment.reserve(expert_requests(self._deployment, missing), room_s)
            self._spares.update(_by_name(self.start(bundles, deadline)))

    def forget_spares(self, lost: Sequence[Member]) -> None:
        """These have died; spares may be among them."""
        self.dismiss([member for member in lost if member.name in self._spares])

    # -- load -----------------------------------------------------------------------------------------------------

    def loads(self) -> NDArray[np.float64]:
        """float64[L, E]: rows per expert of each MoE layer since the last change of the map, over all routers."""
        total = np.zeros((len(self._spec.moe_layers), self._spec.moe.n_experts))
        for router, rows in self._count().items():
            before = self._counted.get(router, {})
            for at, layer in enumerate(self._spec.moe_layers):
                if layer in rows:
                    total[at] += rows[layer] - before.get(layer, 0)
        return total

    def stats(self, shards: Sequence[Member]) -> dict[str, ExpertStats]:
        """What each of ``shards`` tells of itself; those that do not answer are left out."""
        calls = {shard.name: shard.handle.begin("stats") for shard in shards}
        return answers(calls)

    def layers(self) -> list[pb.MoELayer]:
        """Where each expert is, and how many (row, expert) pairs were sent to it since the routers started."""
        assert self.map is not None
        counts = list(self._count().values())
        layers = []
        for layer, experts in sorted(self.map.replicas.items()):
            rows = sum((count[layer] for count in counts if layer in count), np.zeros(len(experts), np.int64))
            placed = [pb.ExpertPlacement(shards=s, rows=int(n)) for s, n in zip(experts, rows, strict=True)]
            layers.append(pb.MoELayer(layer=layer, experts=placed))
        return layers

    def _count(self) -> dict[str, dict[int, NDArray[np.int64]]]:
        return answers({router.name: router.handle.begin("expert_rows") for router in self._routers()})

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _newcomer(self, dead: Member, deadline: float) -> Member:
        """Who takes a dead shard's place: a spare, or a new process in the same room, or in a new one."""
        if self._spares:
            return self._spares.pop(next(iter(self._spares)))
        bundle = self._deployment.renew(dead.bundle, expert_requests(self._deployment, 1)[0], left(deadline))
        return self.start([bundle], deadline)[0]


def expert_requests(deployment: Deployment, count: int) -> list[BundleRequest]:
    """What ``count`` new shards need of their nodes."""
    return [deployment.request("expert", deployment.config.experts) for _ in range(count)]


def _by_name(members: Iterable[Member]) -> dict[str, Member]:
    return {member.name: member for member in members}
