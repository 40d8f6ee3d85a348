"""AttentionFleet: attention replicas, each with its router in the same bundle, and the gateways that they serve."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from expertmesh.v1.control_pb2 import Role

from actors.attention import AttentionShard
from actors.router import Router
from actors.transport.base import Address
from cluster.deployment import Deployment, left
from cluster.expert_fleet import ExpertFleet
from cluster.fleet import ActorUnreachable, Bundle
from cluster.gateway.peers import AttentionPeer
from cluster.loss_watch import LossWatch
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


class AttentionFleet:
    """The attention replicas of a cluster. One thread at a time changes it."""

    def __init__(self, deployment: Deployment, losses: LossWatch) -> None:
        """``losses`` is told of every router."""
        self._deployment = deployment
        self._losses = losses
        self._config = deployment.config.attention
        self._addresses: dict[str, Address] = {}
        self._vacant: list[Bundle | None] = []  # rooms of lost replicas that have no successor yet
        self.replicas: list[Replica] = []

    @property
    def wanted(self) -> int:
        """How many there are to be: those that are lost will be replaced."""
        return len(self.replicas) + len(self._vacant)

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

    def spawn(self, bundles: Sequence[Bundle]) -> list[Replica]:
        """One replica per bundle. They do not serve yet."""
        beside = [r.shard.bundle for r in self.replicas if r.shard.bundle] + list(bundles)
        settings = self._deployment.settings([bundle.node_id for bundle in bundles])
        roster = self._deployment.roster
        spawned = []
        for bundle in bundles:
            name = bundle.name.replace("attention", "router")
            router = roster.spawn(Role.ROLE_ROUTER, Router, name, bundle, settings.router(bundle))
            own = (settings.attention(bundle, beside), settings.engine(bundle))
            shard = roster.spawn(Role.ROLE_ATTENTION, AttentionShard, bundle.name, bundle, *own)
            spawned.append(Replica(shard, router))
        return spawned

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
            arguments = (addresses[replica.router.name], self._deployment.medium, left(deadline))
            replica.shard.handle.call("connect", *arguments, timeout_s=left(deadline))
            self.replicas.append(replica)

    # -- changes --------------------------------------------------------------------------------------------------

    def resize(self, count: int, experts: ExpertFleet, deadline: float) -> None:
        """Another number of replicas; the youngest go first, and their streams move."""
        more = count - len(self.replicas)
        if more > 0:
            self.add(self._deployment.reserve(self.requests(more), left(deadline)), experts, deadline)
        self.retire(self.replicas[count:], experts, deadline)

    def add(self, bundles: Sequence[Bundle], experts: ExpertFleet, deadline: float) -> list[Replica]:
        """Start a replica in each of these bundles and let the gateways use it. All or none."""
        spawned: list[Replica] = []
        try:
            spawned = self.spawn(bundles)
            loads = self.begin(spawned)
            addresses = {name: load.result(left(deadline)) for name, load in loads.items()}
            self.connect(spawned, addresses, experts, deadline)
            for replica in spawned:
                peer = AttentionPeer(replica.shard.handle, addresses[replica.shard.name])
                for gateway in self._deployment.roster.of(Role.ROLE_GATEWAY):
                    gateway.handle.call(
                        "attach", peer, self._deployment.medium, left(deadline), timeout_s=left(deadline)
                    )
        except BaseException:
            self._dismiss(spawned)
            for bundle in bundles:
                self._deployment.release(bundle)
            raise
        return spawned

    def retire(self, leaving: Sequence[Replica], experts: ExpertFleet, deadline: float) -> None:
        """Nothing new for these; when their streams have ended, or were moved after drain_timeout_s, they go."""
        patience = self._deployment.config.drain_timeout_s
        gateways = self._deployment.roster.of(Role.ROLE_GATEWAY)
        calls = [
            (gateway, gateway.handle.begin("retire", replica.shard.name, patience))
            for replica in leaving
            for gateway in gateways
        ]
        for gateway, call in calls:
            try:
                call.result(patience + _RETIRE_SLACK_S)
            except ActorUnreachable as error:
                log.warning("%s is gone: %s", gateway.name, error)
        try:
            experts.part_with([replica.router for replica in leaving], deadline)
        finally:
            self._dismiss(list(leaving))

    def replace(self, lost: Sequence[Member], experts: ExpertFleet, deadline: float) -> list[Replica]:
        """Start a replica for each one of which a part died; gateways move its streams. Returns the new ones."""
        names = {member.name for member in lost}
        started = []
        gone = [r for r in self.replicas if names & {member.name for member in r.members}]
        for dead in gone:
            self.replicas.remove(dead)
            for member in dead.members:
                self._deployment.roster.discard(member, "its partner was lost")
            self._vacant.append(dead.shard.bundle)
        experts.part_with([dead.router for dead in gone], deadline)
        while self._vacant:
            bundle = self._deployment.renew(self._vacant[0], self.requests(1)[0], left(deadline))
            self._vacant[0] = None  # should the start fail, its room is given back
            started += self.add([bundle], experts, deadline)
            self._vacant.pop(0)
        return started

    def _dismiss(self, replicas: Sequence[Replica]) -> None:
        for replica in replicas:
            if replica in self.replicas:
                self.replicas.remove(replica)
            for member in replica.members:
                self._addresses.pop(member.name, None)
                self._deployment.roster.end(member)
            self._deployment.release(replica.shard.bundle)
