"""ExpertFleet: which expert shards there are, and which experts they hold.

Every change goes the same way, ``_install``: weights are read, routers connect, and the new map is committed by all of
them at a step boundary, before anything of the old one goes away. So streams run on meanwhile, and a change that fails
half-way leaves the old map in force.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2 import ClusterEventKind, Role
from numpy.typing import NDArray

from actors.expert import ExpertShard, ExpertStats
from actors.model.spec import MoEDecoderSpec
from actors.transport.base import Address, TransportError
from cluster.calls import answers, log_failure
from cluster.config import ConfigError
from cluster.deployment import Deployment, left
from cluster.expert_groups import ExpertGroups
from cluster.fleet import ActorUnreachable, Bundle
from cluster.roster import Member
from placement.balance import BalancePolicy, ShardRoom, imbalance, plan
from placement.expert_map import ExpertMap, moves, replaced
from placement.spec import BundleRequest

log = logging.getLogger(__name__)

_COMMIT_SLACK_S = 5.0

Routers = Callable[[], list[Member]]


class ExpertFleet:
    """The expert shards of a cluster. One thread at a time changes it.

    ``spec`` says which experts there are; ``routers`` gives the routers that work by the map now.
    """

    def __init__(self, deployment: Deployment, spec: MoEDecoderSpec, routers: Routers) -> None:
        self._deployment = deployment
        self._config = deployment.config.experts
        self._spec = spec
        self._routers = routers
        self._groups = ExpertGroups(deployment) if deployment.nccl else None
        self._epoch = 0
        self._shards: dict[str, Member] = {}
        self._spares: dict[str, Member] = {}
        self._addresses: dict[str, Address] = {}
        self._counted: dict[str, dict[int, NDArray[np.int64]]] = {}
        self.map: ExpertMap | None = None

    @property
    def shards(self) -> list[Member]:
        """The shards of the map, oldest first; those that died and are being replaced among them."""
        return list(self._shards.values())

    @property
    def wanted(self) -> int:
        """How many there are to be."""
        return len(self._shards)

    @property
    def least(self) -> int:
        """Fewest shards that can hold every expert as often as configured."""
        copies = self._spec.moe.n_experts * self._config.min_replicas
        room = self._config.slots and -(-len(self._spec.moe_layers) * copies // self._config.slots)
        return max(self._config.min_replicas, room)

    @property
    def most(self) -> int:
        """With more shards than copies of a layer's experts some would hold nothing of it."""
        return self._spec.moe.n_experts * self._config.min_replicas

    # -- start ----------------------------------------------------------------------------------------------------

    def spawn(self, bundles: Sequence[Bundle]) -> list[Member]:
        """One shard per bundle, named as the bundle. They hold nothing yet."""
        beside = [shard.bundle for shard in self.shards if shard.bundle] + list(bundles)
        settings = self._deployment.settings([bundle.node_id for bundle in bundles])
        return [
            self._deployment.roster.spawn(
                Role.ROLE_EXPERT, ExpertShard, bundle.name, bundle, settings.expert(bundle, beside)
            )
            for bundle in bundles
        ]

    def begin(self, shards: list[Member], deadline: float) -> list[Future[Any]]:
        """Make the first map over ``shards`` and let them read; the futures end when they have. Raises ConfigError."""
        if not self.least <= len(shards) <= self.most:
            raise ConfigError(
                f"experts.shards: {len(shards)}; allowed are {self.least} to {self.most}: "
                f"{self._config.min_replicas} replica(s) of {self._spec.moe.n_experts} experts a layer"
            )
        self._shards = {shard.name: shard for shard in self._listening(shards, deadline)}
        self.map = self._plan(shards)
        return [s.handle.begin("load", self.map.epoch, self.map.held_by(s.name)) for s in shards]

    def introduce(self, routers: Sequence[Member], deadline: float) -> int:
        """Bring new routers to the map in force, or with all the others to a new one; returns its epoch."""
        assert self.map is not None
        if self._groups is not None:
            again = self._same_map() if self._groups.any else self.map
            self._install(again, deadline, routers=[*self._routers(), *routers])
            return self.map.epoch
        self._prepare(routers, self.map, self._shards, deadline)
        for call in [router.handle.begin("commit", self.map.epoch, left(deadline)) for router in routers]:
            call.result(left(deadline))
        return self.map.epoch

    def part_with(self, routers: Sequence[Member], deadline: float) -> None:
        """These routers go, or are gone: the others shall not share a group with them."""
        leaving = {router.name for router in routers}
        staying = [router for router in self._routers() if router.name not in leaving]
        if self._groups is not None and staying and leaving & self._groups.routers:
            self._install(self._same_map(), deadline, routers=staying)

    # -- changes --------------------------------------------------------------------------------------------------

    def resize(self, count: int, deadline: float) -> int:
        """Spread the experts over ``count`` shards; the youngest go first. Returns how many experts were read."""
        more = count - len(self._shards)
        if not more:
            return 0
        started = self._start(more, deadline) if more > 0 else []
        staying = (self.shards + started)[:count]
        return self._change(staying, started, deadline)

    def rebalance(self, deadline: float) -> tuple[int, float, float]:
        """Spread the experts over the same shards by the load that was counted.

        Returns how many experts were read, and the imbalance by that load before and after.
        """
        assert self.map is not None
        old, loads = self.map, self.loads()
        new = self._plan(self.shards)
        read = 0
        if new.replicas != old.replicas:
            read = self._install(new, deadline)
        return read, imbalance(old, loads), imbalance(self.map, loads)

    def drain(self, leaving: Sequence[Member], replace: bool, deadline: float) -> list[Member]:
        """Take shards out of service; with ``replace`` as many start elsewhere. Returns those that were started."""
        started = self._start(len(leaving), deadline) if replace else []
        staying = [shard for shard in self.shards if shard not in leaving] + started
        self._change(staying, started, deadline)
        return started

    def replace(self, lost: Sequence[Member], deadline: float) -> list[Member]:
        """Start a shard for each one that died, with the same experts. Returns the new ones.

        Where the bundle is still there it is used again. Until it has worked, it may be called again.
        """
        dead = [member for member in lost if member.name in self._shards]
        if not dead:
            return []
        new, started = self._same_map(), list[Member]()
        try:
            for member in dead:
                started.append(self._newcomer(member, deadline))
                new = replaced(new, member.name, started[-1].name, new.epoch)
            self._install(new, deadline, started)
        except BaseException:
            self._dismiss(started)
            raise
        for member in dead:
            del self._shards[member.name], self._addresses[member.name]
            self._deployment.release(member.bundle)  # unless its successor has it
        return started

    def restore_spares(self, deadline: float) -> None:
        """Start warm processes without experts until there are as many as configured."""
        missing = self._config.spares - len(self._spares)
        if missing > 0:
            self._spares.update((shard.name, shard) for shard in self._start(missing, deadline))

    def forget_spare(self, dead: Member) -> None:
        """A spare has died."""
        if self._spares.pop(dead.name, None) is not None:
            self._deployment.release(dead.bundle)

    def reconnect(self, deadline: float) -> None:
        """Let every router connect anew to shards that it has lost though they live."""
        self._install(self._same_map(), deadline)

    def missed(self) -> frozenset[str]:
        """Shards that some router has lost and has not got back."""
        calls = {router.name: router.handle.begin("wait_for_loss", 0, frozenset(), 0.0) for router in self._routers()}
        return frozenset[str]().union(*(lost for _, lost in answers(calls).values()))

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

    def _start(self, count: int, deadline: float) -> list[Member]:
        """``count`` shards that listen and hold nothing."""
        return self._listening(
            self.spawn(self._deployment.reserve(expert_requests(self._deployment, count), left(deadline))), deadline
        )

    def _listening(self, spawned: list[Member], deadline: float) -> list[Member]:
        """Wait until they are up, and note their addresses; all or none."""
        try:
            calls = {shard.name: shard.handle.begin("listen") for shard in spawned}
            self._addresses.update({name: call.result(left(deadline)) for name, call in calls.items()})
        except BaseException:
            self._dismiss(spawned)
            raise
        return spawned

    def _change(self, staying: Sequence[Member], started: Sequence[Member], deadline: float) -> int:
        """Install a new plan over ``staying``; then the others go. On failure the started ones go."""
        try:
            read = self._install(self._plan(staying), deadline, started)
        except BaseException:
            self._dismiss(started)
            raise
        leaving = [shard for shard in self.shards if shard not in staying]
        for shard in leaving:
            del self._shards[shard.name]
        self._dismiss(leaving)
        return read

    def _dismiss(self, shards: Iterable[Member]) -> None:
        for shard in shards:
            self._shards.pop(shard.name, None)
            self._addresses.pop(shard.name, None)
            self._deployment.roster.end(shard)
            self._deployment.release(shard.bundle)

    def _newcomer(self, dead: Member, deadline: float) -> Member:
        """Who takes a dead shard's place: a spare, or a new process in the same bundle, or in a new one."""
        if self._spares:
            return self._spares.pop(next(iter(self._spares)))
        bundle = self._deployment.renew(dead.bundle, expert_requests(self._deployment, 1)[0], left(deadline))
        return self._listening(self.spawn([bundle]), deadline)[0]

    def _install(
        self,
        new: ExpertMap,
        deadline: float,
        started: Sequence[Member] = (),
        routers: Sequence[Member] | None = None,
    ) -> int:
        """Bring a map into force on all routers; returns how many experts were read. On failure the old one stays."""
        routers = self._routers() if routers is None else routers
        shards = {**self._shards, **{shard.name: shard for shard in started}}
        try:
            read = self._read(new, shards, deadline)
            routers = self._prepare(routers, new, shards, deadline)
        except BaseException:
            self._undo(routers)
            raise
        self._commit(routers, new)
        if self._groups is not None:
            self._groups.settle()
        old, self.map = self.map, new
        self._shards.update((shard.name, shard) for shard in started)
        self._counted = self._count()
        for name in new.shards:
            if old is not None and set(old.held_by(name)) - set(new.held_by(name)):
                self._let_go(name, new)
        self._deployment.events.tell(
            ClusterEventKind.CLUSTER_EVENT_KIND_MAP_COMMITTED,
            f"expert map {new.epoch} is in force on {', '.join(new.shards)}; {read} experts were read for it",
            epoch=new.epoch,
        )
        return read

    def _read(self, new: ExpertMap, members: Mapping[str, Member], deadline: float) -> int:
        calls = [members[name].handle.begin("load", new.epoch, new.held_by(name)) for name in moves(self.map, new)]
        return sum(call.result(left(deadline)) for call in calls)

    def _prepare(
        self, routers: Sequence[Member], new: ExpertMap, shards: Mapping[str, Member], deadline: float
    ) -> list[Member]:
        """Connect all routers to the shards of ``new``; returns those that are still there."""
        addresses = {name: self._addresses[name] for name in new.shards}
        if self._groups is not None:
            return self._groups.form(new, routers, [shards[name] for name in new.shards], addresses, deadline)
        arguments = (new, addresses, self._deployment.medium, left(deadline))
        calls = [(router, router.handle.begin("prepare", *arguments)) for router in routers]
        prepared = []
        for router, call in calls:
            try:
                call.result(left(deadline))
                prepared.append(router)
            except ActorUnreachable as error:
                log.warning("%s is gone: %s", router.name, error)
        return prepared

    def _commit(self, routers: Sequence[Member], new: ExpertMap) -> None:
        """From here on there is no way back: a router that does not come along is taken for dead."""
        patience = 2 * self._deployment.config.step_timeout_s + _COMMIT_SLACK_S  # within it any step ends
        calls = [(router, router.handle.begin("commit", new.epoch, patience)) for router in routers]
        for router, call in calls:
            try:
                call.result(patience + _COMMIT_SLACK_S)
            except (ActorUnreachable, TransportError, TimeoutError) as error:
                self._deployment.roster.lose(router, f"it did not commit expert map {new.epoch}: {error}")

    def _undo(self, routers: Sequence[Member]) -> None:
        """The old map stays: forget what was prepared and read for the new one."""
        for router in routers:
            router.handle.begin("withdraw").add_done_callback(log_failure)
        if self._groups is not None:
            self._groups.undo()
        if self.map is not None:
            for name in self._shards:
                self._let_go(name, self.map)

    def _let_go(self, name: str, held: ExpertMap) -> None:
        """Tell a shard to keep only what it has in ``held``; nobody waits for that."""
        keep = self._shards[name].handle.begin("keep", held.epoch, held.held_by(name))
        keep.add_done_callback(log_failure)

    def _plan(self, shards: Sequence[Member]) -> ExpertMap:
        layers, n_experts = self._spec.moe_layers, self._spec.moe.n_experts
        least = len(layers) * -(-n_experts * self._config.min_replicas // len(shards))
        rooms = [
            ShardRoom(shard.name, shard.bundle.node_id if shard.bundle else "", self._config.slots or least)
            for shard in shards
        ]
        extra = None if self._config.slots else 0
        policy = BalancePolicy(min_replicas=self._config.min_replicas, extra_slots=extra)
        return plan(layers, n_experts, self.loads(), rooms, self.map, policy, self._next_epoch())

    def _same_map(self) -> ExpertMap:
        assert self.map is not None
        return ExpertMap(self._next_epoch(), self.map.n_experts, self.map.replicas)

    def _next_epoch(self) -> int:
        """Counts up at every attempt: what a failed one may have left behind is of an older epoch."""
        self._epoch += 1
        return self._epoch


def expert_requests(deployment: Deployment, count: int) -> list[BundleRequest]:
    """What ``count`` new shards need of their nodes."""
    return [deployment.request("expert", deployment.config.experts) for _ in range(count)]
