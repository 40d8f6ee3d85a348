"""ExpertMaps: the expert map in force, and how all routers are brought to another one.

Weights are read, every router prepares, then every router commits at its next step boundary, before anything of the old
map goes away. So streams run on meanwhile. Until the first router commits, a failure leaves the old map in force;
from then on there is no way back, and a router that does not come along is lost.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

from expertmesh.v1.control_pb2 import ClusterEventKind

from actors.transport.base import Address
from cluster.calls import log_failure, results
from cluster.deployment import Deployment, left
from cluster.expert_groups import ExpertGroups
from cluster.fleet import ActorUnreachable
from cluster.roster import Member
from placement.expert_map import ExpertMap, moves

log = logging.getLogger(__name__)

_COMMIT_SLACK_S = 5.0

Routers = Callable[[], list[Member]]


class ExpertMaps:
    """One per cluster. One thread at a time changes it; ``routers`` gives those that work by the map now."""

    def __init__(self, deployment: Deployment, routers: Routers) -> None:
        self.in_force: ExpertMap | None = None
        self._deployment = deployment
        self._routers = routers
        self._groups = ExpertGroups(deployment) if deployment.wires.nccl else None
        self._epochs = itertools.count(1)

    def next_epoch(self) -> int:
        """Counts up at every attempt: what a failed one may have left behind is of an older epoch. Any thread."""
        return next(self._epochs)

    def again(self, expert_map: ExpertMap | None = None) -> ExpertMap:
        """This map (the one in force if none is given) as a new one."""
        old = expert_map or self.in_force
        assert old is not None
        return ExpertMap(self.next_epoch(), old.n_experts, old.replicas)

    def introduce(
        self,
        routers: Sequence[Member],
        shards: Mapping[str, Member],
        addresses: Mapping[str, Address],
        deadline: float,
    ) -> int:
        """Bring new routers to the map in force, or with all the others to a new one; returns its epoch."""
        assert self.in_force is not None
        if self._groups is not None:
            new = self.again() if self._groups.any else self.in_force
            self.install(new, shards, addresses, deadline, [*self._routers(), *routers])
            return self.in_force.epoch
        epoch = self.in_force.epoch
        if len(self._prepare(routers, self.in_force, shards, addresses, deadline)) < len(routers):
            raise ActorUnreachable("a new router died while it was started")
        for call in [router.handle.begin("commit", epoch, left(deadline)) for router in routers]:
            call.result(left(deadline))
        return epoch

    def part_with(
        self,
        routers: Sequence[Member],
        shards: Mapping[str, Member],
        addresses: Mapping[str, Address],
        deadline: float,
    ) -> None:
        """These routers go, or are gone: the others shall not share a group with them."""
        leaving = {router.name for router in routers}
        staying = [router for router in self._routers() if router.name not in leaving]
        if self._groups is not None and staying and leaving & self._groups.routers:
            self.install(self.again(), shards, addresses, deadline, staying)

    def install(
        self,
        new: ExpertMap,
        shards: Mapping[str, Member],
        addresses: Mapping[str, Address],
        deadline: float,
        routers: Sequence[Member] | None = None,
    ) -> int:
        """Bring ``new`` into force on all routers; returns how many experts were read. On failure the old one stays.

        ``shards``: the members of the old map and of the new one, by name, as far as they live.
        """
        routers = self._routers() if routers is None else routers
        try:
            read = self.read(new, shards, deadline)
            prepared = self._prepare(routers, new, shards, addresses, deadline)
        except BaseException:
            self._undo(routers, shards, new.epoch)
            raise
        self._commit(prepared, new)
        if self._groups is not None:
            self._groups.settle()
        old, self.in_force = self.in_force, new
        for name in new.shards:
            if old is not None and set(old.held_by(name)) - set(new.held_by(name)):
                self._let_go(shards[name], new, new.epoch)
        self._deployment.events.tell(
            ClusterEventKind.CLUSTER_EVENT_KIND_MAP_COMMITTED,
            f"expert map {new.epoch} is in force on {', '.join(new.shards)}; {read} experts were read for it",
            epoch=new.epoch,
        )
        return read

    def read(self, new: ExpertMap, shards: Mapping[str, Member], deadline: float) -> int:
        """Let shards read what ``new`` gives them beyond the map in force; returns how many experts that were.

        Any thread: a map in force meanwhile is served on.
        """
        moved = moves(self.in_force, new)
        calls = {name: shards[name].handle.begin("load", new.epoch, new.held_by(name)) for name in moved}
        results(calls, deadline)
        return sum(map(len, moved.values()))

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _prepare(
        self,
        routers: Sequence[Member],
        new: ExpertMap,
        shards: Mapping[str, Member],
        addresses: Mapping[str, Address],
        deadline: float,
    ) -> list[Member]:
        """Connect all routers to the shards of ``new``; returns those that are still there, the others are lost."""
        known = {name: addresses[name] for name in new.shards}
        if self._groups is not None:
            return self._groups.form(new, routers, [shards[name] for name in new.shards], known, deadline)
        there = self._deployment.roster.answering(routers)
        arguments = (new, known, self._deployment.wires.medium, left(deadline))
        calls = {router.name: router.handle.begin("prepare", *arguments) for router in there}
        prepared = results(calls, deadline, may_be_gone=True)
        return [router for router in there if router.name in prepared]

    def _commit(self, routers: Sequence[Member], new: ExpertMap) -> None:
        patience = 2 * self._deployment.config.step_timeout_s + _COMMIT_SLACK_S  # within it any step ends
        calls = [(router, router.handle.begin("commit", new.epoch, patience)) for router in routers]
        for router, call in calls:
            try:
                call.result(patience + _COMMIT_SLACK_S)
            except Exception as error:  # whatever it is: the others have committed, it must not work by the old map
                self._deployment.roster.lose(router, f"it did not commit expert map {new.epoch}: {error!r}")

    def _undo(self, routers: Sequence[Member], shards: Mapping[str, Member], epoch: int) -> None:
        """The old map stays: forget what was prepared and read for the one of ``epoch``."""
        for router in routers:
            router.handle.begin("withdraw", epoch).add_done_callback(log_failure)
        if self._groups is not None:
            self._groups.undo()
        self.forget_read(epoch, shards)

    def forget_read(self, epoch: int, shards: Mapping[str, Member]) -> None:
        """What was read for the map of ``epoch`` is not needed."""
        if self.in_force is not None:
            for name in self.in_force.shards:
                if name in shards:
                    self._let_go(shards[name], self.in_force, epoch)

    def _let_go(self, shard: Member, held: ExpertMap, epoch: int) -> None:
        """Tell a shard to keep only what it has in ``held``, unless it has read for a map after ``epoch`` meanwhile.

        Nobody waits for that.
        """
        keep = shard.handle.begin("keep", epoch, held.held_by(shard.name))
        keep.add_done_callback(log_failure)
