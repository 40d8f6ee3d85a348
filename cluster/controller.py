"""Controller: turns the configuration into a running cluster, changes it on demand, repairs it, and tells what runs.

The main path is ``start``: place → spawn → load → connect → open the gateway. Later changes are one method each; they
are carried out one at a time, under ``_changing``, repairs among them. Nothing here is on the way of a token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace

from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2 import ClusterEventKind, Role

from actors.model.families import load_spec
from cluster.attention_fleet import AttentionFleet
from cluster.autoscaler import Autoscaler
from cluster.config import ServerConfig
from cluster.deployment import Deployment, left
from cluster.events import EventLog
from cluster.expert_fleet import ExpertFleet, expert_requests
from cluster.fleet import ActorHandle, Fleet
from cluster.gateway.server import Gateway
from cluster.loss_watch import LossWatch
from cluster.model_source import model_name
from cluster.operations import BadOperation, Busy, Leaving, find_target
from cluster.roster import Member, Roster
from cluster.supervisor import Supervisor
from cluster.view import cluster_view

log = logging.getLogger(__name__)

_STATS_TIMEOUT_S = 2.0
_SHOWN_EVENTS = 10
_MOST_REPLICAS = 1024
_MOST_CHANGES = 4  # each waits in a thread of this actor, and looking at the cluster must go on
_ONCE_IN_S = 30.0
_READING = "reading weights"
_STOP_ORDER = (Role.ROLE_GATEWAY, Role.ROLE_ATTENTION, Role.ROLE_ROUTER, Role.ROLE_EXPERT)


class StartFailed(RuntimeError):
    """The cluster did not come up; everything that had been started is gone again."""


@dataclass
class Progress:
    """How far ``start`` is: what it does now, and weight bytes read so far."""

    phase: str = "placing actors"
    loaded_bytes: int = 0


class Controller:
    """One per cluster. ``start`` once, ``stop`` once; everything else at any time between."""

    def __init__(self, config: ServerConfig, fleet: Fleet) -> None:
        self._config = config
        self._fleet = fleet
        self._events = EventLog()
        self._supervisor = Supervisor(self._examine, self._repair, self._repair_failed)
        self._roster = Roster(fleet, self._events, self._supervisor.lost)
        self._deployment = Deployment(config, fleet, self._roster, self._events)
        self._losses = LossWatch(self._supervisor.suspect)
        self._attention = AttentionFleet(self._deployment, self._losses)
        self._experts: ExpertFleet | None = None
        self._autoscaler: Autoscaler | None = None
        self._own: ActorHandle | None = None
        self._changing = threading.Lock()
        self._queue = threading.BoundedSemaphore(_MOST_CHANGES)
        self._progress = Progress()
        self._address = ""
        self._reconnected: dict[str, float] = {}
        self._asked: dict[str, Future[int]] = {}
        self._loaded: dict[str, int] = {}

    # -- start and stop -------------------------------------------------------------------------------------------

    def start(self, own: ActorHandle) -> str:
        """Bring everything up and return the gateway's "HOST:PORT". ``own`` is this controller, for the gateway.

        On any failure whatever was started is stopped and released before the error goes on.
        """
        self._own = own
        try:
            with self._changing:
                return self._start(time.monotonic() + self._config.start_timeout_s)
        except TimeoutError as error:
            self.stop()
            raise StartFailed(self._late()) from error
        except BaseException:
            self.stop()
            raise

    def progress(self) -> Progress:
        """For a progress bar while ``start`` runs. Never waits: it tells what the actors last said."""
        if self._progress.phase == _READING:
            for member in (*self._roster.of(Role.ROLE_EXPERT), *self._roster.of(Role.ROLE_ATTENTION)):
                self._ask_loaded(member)
            self._progress.loaded_bytes = sum(self._loaded.values())
        return self._progress

    def stop(self) -> None:
        """Drain the gateways, stop every actor, release every bundle; a change that still runs ends. Idempotent."""
        self._roster.close()
        if self._autoscaler is not None:
            self._autoscaler.stop()
        for role in _STOP_ORDER:
            for member in self._roster.of(role):
                self._roster.end(member)
        self._supervisor.stop()
        self._deployment.release_all()
        self._events.close()

    # -- what operators ask ---------------------------------------------------------------------------------------

    def view(self, include_experts: bool = False) -> bytes:
        """The cluster as a serialised ``expertmesh.v1.GetClusterResponse``."""
        experts = self._experts
        epoch = experts.map.epoch if experts and experts.map else 0
        view: pb.GetClusterResponse = cluster_view(
            model_name(self._config.model), epoch, self._fleet, self._roster.all(), _STATS_TIMEOUT_S
        )
        view.attention_replicas_wanted = self._attention.wanted
        view.expert_autoscaling = self._config.experts.autoscale.mode
        view.events.extend(self._events.latest(_SHOWN_EVENTS))
        if experts is not None:
            view.expert_shards_wanted = experts.wanted
            if include_experts:
                view.layers.extend(experts.layers())
        return view.SerializeToString()

    def events(self, after: int, timeout_s: float) -> list[bytes]:
        """Serialised ``ClusterEvent`` after this one; waits for the first of them, empty after ``timeout_s``."""
        return [event.SerializeToString() for event in self._events.after(after, timeout_s)]

    def scale_experts(self, shards: int) -> bytes:
        """Another number of expert shards. Raises BadOperation, NoRoom."""
        with self._change():
            experts, deadline = self._ready(), self._deadline()
            if not experts.least <= shards <= experts.most:
                raise BadOperation("shards", f"{shards}; allowed are {experts.least} to {experts.most}")
            read = experts.resize(shards, deadline)
            assert experts.map is not None
            response = pb.ScaleExpertsResponse(expert_map_epoch=experts.map.epoch, experts_read=read)
            response.shards.extend(shard.name for shard in experts.shards)
            return response.SerializeToString()

    def scale_attention(self, replicas: int) -> bytes:
        """Another number of attention replicas. Raises BadOperation, NoRoom."""
        with self._change():
            experts, deadline = self._ready(), self._deadline()
            if not 1 <= replicas <= _MOST_REPLICAS:
                raise BadOperation("replicas", f"{replicas}; allowed are 1 to {_MOST_REPLICAS}")
            self._attention.resize(replicas, experts, deadline)
            names = [replica.shard.name for replica in self._attention.replicas]
            return pb.ScaleAttentionResponse(replicas=names).SerializeToString()

    def rebalance(self) -> bytes:
        """Spread the experts anew by the load that was counted."""
        with self._change():
            experts = self._ready()
            read, before, after = experts.rebalance(self._deadline())
            assert experts.map is not None
            response = pb.RebalanceResponse(
                expert_map_epoch=experts.map.epoch, experts_read=read, imbalance_before=before, imbalance_after=after
            )
            return response.SerializeToString()

    def drain(self, actor: str, node: str) -> bytes:
        """Take one shard, or everything on a node, out of service. Raises BadOperation, NoRoom."""
        with self._change():
            experts, deadline = self._ready(), self._deadline()
            leaving = find_target(actor, node, self._fleet, experts, self._attention)
            cordoned = self._deployment.cordoned
            self._deployment.cordoned = cordoned | ({leaving.node} if leaving.node else set())
            try:
                started = self._drain(leaving, experts, deadline)
            except BaseException:
                self._deployment.cordoned = cordoned
                raise
            return pb.DrainResponse(stopped=leaving.names, started=started).SerializeToString()

    # -- the steps of start ---------------------------------------------------------------------------------------

    def _start(self, deadline: float) -> str:
        attention, home = self._attention, self._fleet.home()
        replicas = attention.requests(self._config.attention.replicas)
        shards = expert_requests(self._deployment, self._config.experts.shards)
        bundles = self._deployment.reserve(replicas + shards, left(deadline))
        self._progress.phase = "preparing the model"
        settings = self._deployment.settings([home, *(bundle.node_id for bundle in bundles)])
        experts = ExpertFleet(self._deployment, load_spec(settings.paths[home]), lambda: attention.routers)
        self._progress.phase = "starting actors"
        gateway = self._spawn_gateway()
        spawned = experts.spawn(bundles[len(replicas) :])
        pairs = attention.spawn(bundles[: len(replicas)])
        self._progress.phase = _READING
        loading = attention.begin(pairs)
        opening = gateway.handle.begin("load")
        for load in experts.begin(spawned, deadline):
            load.result(left(deadline))
        addresses = {name: load.result(left(deadline)) for name, load in loading.items()}
        opening.result(left(deadline))
        self._progress.phase = "connecting"
        attention.connect(pairs, addresses, experts, deadline)
        self._experts = experts
        address = self._open(gateway, deadline)
        self._supervisor.start()
        experts.restore_spares(deadline)
        self._autoscaler = Autoscaler(
            self._config.experts.autoscale, self._events, experts, self._changing.locked, self._scale_by_load
        )
        self._autoscaler.start()
        return address

    def _spawn_gateway(self, port: int | None = None) -> Member:
        home = self._fleet.home()
        settings = self._deployment.settings([home]).gateway(home)
        if port is not None:
            settings = replace(settings, port=port)
        name = self._roster.fresh_name("gateway")
        return self._roster.spawn(Role.ROLE_GATEWAY, Gateway, name, None, settings)

    def _open(self, gateway: Member, deadline: float) -> str:
        arguments = (self._attention.peers, self._own, self._deployment.medium, left(deadline))
        gateway.handle.call("connect", *arguments, timeout_s=left(deadline))
        self._address = str(gateway.handle.call("serve", timeout_s=left(deadline)))
        self._losses.follow(gateway)
        return self._address

    def _late(self) -> str:
        return f"not up within start_timeout_s ({self._config.start_timeout_s:g} s); last: {self._progress.phase}"

    def _ask_loaded(self, member: Member) -> None:
        asked = self._asked.get(member.name)
        if asked is None or asked.done():
            if asked is not None and asked.exception() is None:
                self._loaded[member.name] = asked.result()
            self._asked[member.name] = member.handle.begin("loaded_bytes")

    # -- changes that nobody asked for ----------------------------------------------------------------------------

    def _examine(self, suspects: frozenset[str]) -> None:
        """Some router has lost these expert shards: those that answer are connected anew, the others are lost. Or a
        gateway has lost attention shards: whether they live or not, they are of no use without it."""
        with self._changing:
            for replica in [r for r in self._attention.replicas if r.shard.name in suspects]:
                self._roster.lose(replica.shard, "a gateway lost its wire")
            experts, deadline = self._ready(), self._deadline()
            still = suspects & experts.missed()  # a repair may have settled what was reported
            members = [shard for shard in experts.shards if shard.name in still]
            answers = experts.stats(members)
            dead = [shard for shard in members if shard.name not in answers]
            for shard in dead:
                self._roster.lose(shard, "a router lost it, and it does not answer")
            if members and not dead:
                experts.reconnect(deadline)  # else the map that replaces the dead connects to the others anew

    def _repair(self, lost: list[Member]) -> None:
        """Replace what died. Called again with the same members if it raises."""
        with self._changing:
            experts, deadline = self._ready(), self._deadline()
            started = [member.name for member in experts.replace(lost, deadline)]
            started += [replica.shard.name for replica in self._attention.replace(lost, experts, deadline)]
            if any(member.role == Role.ROLE_GATEWAY for member in lost) and not self._roster.of(Role.ROLE_GATEWAY):
                started.append(self._replace_gateway(deadline))
            for name in started:
                self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_ACTOR_STARTED, f"{name} was started", name)
            experts.restore_spares(deadline)

    def _replace_gateway(self, deadline: float) -> str:
        """A new door at the same address; open streams were lost with the old one, clients resume them."""
        gateway = self._spawn_gateway(int(self._address.rpartition(":")[2]))
        try:
            gateway.handle.call("load", timeout_s=left(deadline))
            self._open(gateway, deadline)
        except BaseException:
            self._roster.discard(gateway, "it could not open")
            raise
        return gateway.name

    def _repair_failed(self, error: Exception) -> None:
        text = f"a repair failed and will be tried again: {type(error).__name__}: {error}"
        self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_FAILED, text)

    def _scale_by_load(self, wanted: int) -> None:
        """What the autoscaler decided. Refused while something else is being changed."""
        if not self._changing.acquire(blocking=False):
            return
        try:
            experts = self._ready()
            experts.resize(max(experts.least, min(wanted, experts.most)), self._deadline())
        finally:
            self._changing.release()

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _drain(self, leaving: Leaving, experts: ExpertFleet, deadline: float) -> list[str]:
        """Successors first, where there are to be any; then the leaving ones go."""
        elsewhere = bool(leaving.node)
        started: list[str] = []
        if leaving.replicas:
            if elsewhere:
                requests = self._attention.requests(len(leaving.replicas))
                bundles = self._deployment.reserve(requests, left(deadline))
                started += [r.shard.name for r in self._attention.add(bundles, experts, deadline)]
            self._attention.retire(leaving.replicas, experts, deadline)
        if leaving.shards:
            started += [shard.name for shard in experts.drain(leaving.shards, elsewhere, deadline)]
        return started

    @contextmanager
    def _change(self) -> Iterator[None]:
        """An operator's change, when the ones before are through. Raises Busy when too many wait already."""
        if not self._queue.acquire(blocking=False):
            raise Busy(f"{_MOST_CHANGES} changes are waiting or under way already")
        try:
            with self._changing:
                yield
        finally:
            self._queue.release()

    def _ready(self) -> ExpertFleet:
        if self._experts is None:
            raise BadOperation("cluster", "it is not up yet")
        return self._experts

    def _deadline(self) -> float:
        return time.monotonic() + self._config.start_timeout_s
