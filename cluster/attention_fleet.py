"""AttentionFleet: attention replicas, each with its router in the same bundle, and the gateways that they serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from expertmesh.v1.control_pb2 import Role

from actors.transport.base import Address
from cluster.actor_class import ATTENTION_SHARD, ROUTER
from cluster.calls import results
from cluster.deployment import PROCESS_START_S, Deployment, left
from cluster.expert_fleet import ExpertFleet
from cluster.fleet import ActorUnreachable, Bundle
from cluster.gateway.peers import AttentionPeer
from cluster.loss_watch import LossWatch
from cluster.refusals import ChangeFailed
from cluster.roster import Member
from placement.spec import BundleRequest

log = logging.getLogger(__name__)

_RETIRE_SLACK_S = 30.0


@dataclass(frozen=True)
class Replica:
    """An attention shard and the router beside it: they come and go together."""

    shard: Member
    router: Member

    @property
    def members(self) -> tuple[Member, Member]:
        """Both."""
        return self.shard, self.router


@dataclass(frozen=True)
class Started:
    """A replica that has read its weights, and the addresses of its members by name."""

    replica: Replica
    addresses: dict[str, Address]


class AttentionFleet:
    """The attention replicas of a cluster. One thread at a time changes it."""

    def __init__(self, deployment: Deployment, losses: LossWatch) -> None:
        """``losses`` is told of every router."""
        self._deployment = deployment
        self._losses = losses
        self._config = deployment.config.attention
        self._addresses: dict[str, Address] = {}
        self._vacant: list[Bundle | None] = []  # rooms of lost replicas that have no successor yet
        self._leaving: list[Replica] = []
        self.replicas: list[Replica] = []

    @property
    def wanted(self) -> int:
        """How many there are to be: those that are lost will be replaced, those that leave will not."""
        return len(self.staying) + len(self._vacant)

    @property
    def staying(self) -> list[Replica]:
        """The replicas that do not leave, oldest first."""
        return [replica for replica in self.replicas if replica not in self._leaving]

    @property
    def routers(self) -> list[Member]:
        """The routers on duty."""
        return [replica.router for replica in self.replicas]

    @property
    def peers(self) -> list[AttentionPeer]:
        """The attention shards as gateways know them."""
        return [AttentionPeer(r.shard.handle, self._addresses[r.shard.name]) for r in self.replicas]

    # -- start ----------------------------------------------------------------------------------------------------

    def requests(self, count: int) -> list[BundleRequest]:
        """What ``count`` new replicas need of their nodes."""
        return [self._deployment.request("attention", self._config, actors=2) for _ in range(count)]

    def spawn(self, bundles: Sequence[Bundle], deadline: float) -> list[Replica]:
        """One replica per bundle. They do not serve yet. If that fails, nothing of it is left, the bundles neither."""
        spawned, spawn = list[Member](), self._deployment.roster.spawn
        try:
            beside = [r.shard.bundle for r in self.replicas if r.shard.bundle] + list(bundles)
            settings = self._deployment.settings([bundle.node_id for bundle in bundles], deadline)
            for bundle in bundles:
                name = bundle.name.replace("attention", "router")
                spawned.append(spawn(Role.ROLE_ROUTER, ROUTER, name, bundle, settings.router(bundle)))
                own = (settings.attention(bundle, beside), settings.engine(bundle, beside, self._deployment.nodes))
                spawned.append(spawn(Role.ROLE_ATTENTION, ATTENTION_SHARD, bundle.name, bundle, *own))
        except BaseException:
            for member in spawned:
                self._deployment.roster.end(member)
            for bundle in bundles:
                self._deployment.release(bundle)
            raise
        return [Replica(shard, router) for router, shard in zip(spawned[::2], spawned[1::2], strict=True)]

    def begin(self, replicas: Sequence[Replica]) -> dict[str, Future[Any]]:
        """Let them read their weights; the futures give each one's address, by name."""
        return {member.name: member.handle.begin("load") for replica in replicas for member in replica.members}

    def connect(
        self, replicas: Sequence[Replica], addresses: dict[str, Address], experts: ExpertFleet, deadline: float
    ) -> None:
        """Routers to the experts, attention shards to their routers: the replicas can serve then."""
        self._addresses.update(addresses)
        epoch = experts.introduce([replica.router for replica in replicas], deadline)
        for replica in replicas:
            self._losses.follow(replica.router, epoch)
            arguments = (addresses[replica.router.name], self._deployment.wires.medium, left(deadline))
            replica.shard.handle.call("connect", *arguments, timeout_s=left(deadline))
            self.replicas.append(replica)

    # -- changes --------------------------------------------------------------------------------------------------

    def missing(self, count: int) -> int:
        """How many replicas have to be started for ``count``, beside those that will be for lost ones."""
        return max(0, count - self.wanted)

    def start(self, bundles: Sequence[Bundle], deadline: float) -> list[Started]:
        """Replicas that have read their weights, with their addresses; they serve after ``add``. All or none."""
        replicas = self.spawn(bundles, deadline)
        try:
            self._await_life(replicas, deadline)
            loads = self.begin(replicas)
            addresses = results(loads, deadline)
        except BaseException:
            self.dismiss(replicas)
            raise
        return [Started(r, {member.name: addresses[member.name] for member in r.members}) for r in replicas]

    def add(self, started: Sequence[Started], experts: ExpertFleet, deadline: float) -> list[Replica]:
        """Connect replicas that were started, and let the gateways use them. All or none."""
        replicas = [new.replica for new in started]
        try:
            addresses = {name: address for new in started for name, address in new.addresses.items()}
            self.connect(replicas, addresses, experts, deadline)
            for replica in replicas:
                peer = AttentionPeer(replica.shard.handle, addresses[replica.shard.name])
                arguments = ("attach", peer, self._deployment.wires.medium, left(deadline))
                gateways = self._deployment.roster.of(Role.ROLE_GATEWAY)
                results({g.name: g.handle.begin(*arguments) for g in gateways}, deadline, may_be_gone=True)
        except BaseException:
            self.dismiss(replicas)
            raise
        return replicas

    def leave(self, count: int) -> list[Replica]:
        """Whom to ``retire`` so that ``count`` stay: the youngest. Rooms of lost ones are given back if not needed.

        Should they die before they are gone, nobody takes their place.
        """
        while self._vacant and self.wanted > count:
            self._deployment.release(self._vacant.pop())
        leaving = self.staying[count:]
        self.leave_these(leaving)
        return leaving

    def leave_these(self, leaving: Sequence[Replica]) -> None:
        """They are going to be retired."""
        self._leaving += leaving

    def retire(self, leaving: Sequence[Replica]) -> list[Replica]:
        """Nothing new for these, which ``leave``; returns when their streams have ended, or were moved after
        drain_timeout_s. Waits for long: repairs may go on meanwhile.

        Returns those that nobody uses any more, to be dismissed. Raises ChangeFailed naming a replica that has to
        stay, when none of them could be retired.
        """
        patience = self._deployment.config.drain_timeout_s
        gateways = self._deployment.roster.of(Role.ROLE_GATEWAY)
        calls = {r: [g.handle.begin("retire", r.shard.name, patience) for g in gateways] for r in leaving}
        free: list[Replica] = []
        failures: list[Exception] = []
        for replica, asked in calls.items():
            try:
                for call in asked:
                    with suppress(ActorUnreachable):  # a gateway that is gone uses nobody
                        call.result(patience + _RETIRE_SLACK_S)
                free.append(replica)
            except Exception as error:  # OnlyShard, TimeoutError: this one has to stay, the others may go
                log.warning("%s stays: %r", replica.shard.name, error)
                failures.append(error)
                self._leaving.remove(replica)
        if failures and not free:
            raise ChangeFailed(f"nobody could be retired: {failures[0]}")
        return free

    def part_with(self, leaving: Sequence[Replica], experts: ExpertFleet, deadline: float) -> None:
        """Retired replicas go."""
        try:
            experts.part_with([replica.router for replica in leaving], deadline)
        finally:
            self.dismiss(leaving)

    def forget(self, lost: Sequence[Member], experts: ExpertFleet, deadline: float) -> None:
        """Replicas of which a part died are no more; their rooms wait for successors."""
        names = {member.name for member in lost}
        gone = [r for r in self.replicas if names & {member.name for member in r.members}]
        for dead in gone:
            self.replicas.remove(dead)
            for member in dead.members:
                self._deployment.roster.discard(member, "its partner was lost")
            if dead in self._leaving:
                self._deployment.release(dead.shard.bundle)
            else:
                self._vacant.append(dead.shard.bundle)
        experts.part_with([dead.router for dead in gone], deadline)

    def replace(self, experts: ExpertFleet, deadline: float) -> None:
        """Start a replica for each one that is missing. Where the room of a lost one is still there it is used."""
        while self._vacant:
            room, self._vacant[0] = self._vacant[0], None  # should the start fail, its room is given back
            bundle = self._deployment.renew(room, self.requests(1)[0], left(deadline))
            self.add(self.start([bundle], deadline), experts, deadline)
            self._vacant.pop(0)

    def dismiss(self, replicas: Sequence[Replica]) -> None:
        """End them, and give their rooms back."""
        for replica in replicas:
            for members in (self.replicas, self._leaving):
                if replica in members:
                    members.remove(replica)
            for member in replica.members:
                self._addresses.pop(member.name, None)
                self._deployment.roster.end(member)
            self._deployment.release(replica.shard.bundle)

    def _await_life(self, replicas: Sequence[Replica], deadline: float) -> None:
        """Wait until the processes are up, not too long: Ray may not know yet that a node is dead."""
        members = [member for replica in replicas for member in replica.members]
        soon = min(deadline, time.monotonic() + PROCESS_START_S)
        results({member.name: member.handle.begin("stats") for member in members}, soon)
