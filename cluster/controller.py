"""Controller: turns the configuration into a running cluster, changes it on demand, repairs it, and tells what runs.

The main path is ``start``: place → spawn → load → connect → open the gateway. Later changes are one method each,
and carried out one after the other; ``repairs.py`` is what nobody asks for. Nothing here is on the way of a token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1.control_pb2 import ClusterEventKind, Role

from actors.model.errors import CheckpointError
from actors.model.families import load_spec
from actors.refusals import NoMemory, StaleEpoch
from actors.transport.base import TransportError
from cluster.attention_fleet import AttentionFleet, Replica
from cluster.autoscaler import Autoscaler
from cluster.config import ConfigError, ServerConfig
from cluster.deployment import Deployment, left
from cluster.events import EventLog
from cluster.expert_fleet import ExpertFleet, expert_requests
from cluster.fleet import ActorHandle, ActorUnreachable, Fleet
from cluster.gateway.settings import Doors
from cluster.gateway_fleet import GatewayFleet
from cluster.loss_watch import LossWatch
from cluster.model_source import model_name
from cluster.operations import Leaving, find_node, find_target
from cluster.refusals import BadOperation, Busy, ChangeFailed
from cluster.repairs import Repairs
from cluster.roster import Member, Roster, Stopping
from cluster.shard_counts import check_shards, first_count, shard_limits
from cluster.supervisor import Supervisor
from cluster.tracer import Tracer
from cluster.view import cluster_view

log = logging.getLogger(__name__)

_SHOWN_EVENTS = 10
_MOST_REPLICAS = 1024
_MOST_CHANGES = 4  # each waits in a thread of this actor, and looking at the cluster must go on
_READING = "reading weights"
_STOP_ORDER = (Role.ROLE_GATEWAY, Role.ROLE_ATTENTION, Role.ROLE_ROUTER, Role.ROLE_EXPERT)


_MAY_HAPPEN = (ActorUnreachable, TransportError, TimeoutError, StaleEpoch, NoMemory, ConfigError, CheckpointError)


class StartFailed(RuntimeError):
    """The cluster did not come up; everything that had been started is gone again."""


@dataclass
class Progress:
    """How far ``start`` is: what it does now, weight bytes read so far, and how many expert shards there will be."""

    phase: str = "placing actors"
    loaded_bytes: int = 0
    expert_shards: int = 0


class Controller:
    """One per cluster. ``start`` once, ``stop`` once; everything else at any time between."""

    def __init__(self, config: ServerConfig, fleet: Fleet) -> None:
        self._config = config
        self._fleet = fleet
        self._events = EventLog()
        self._supervisor = Supervisor(
            lambda suspects: self._repairs.examine(suspects),
            lambda lost: self._repairs.repair(lost),
            self._repair_failed,
        )
        self._roster = Roster(fleet, self._events, self._supervisor.lost)
        self._deployment = Deployment(config, fleet, self._roster, self._events)
        losses = LossWatch(self._supervisor.suspect)
        self._attention = AttentionFleet(self._deployment, losses)
        self._gateways = GatewayFleet(self._deployment, self._attention, losses)
        self._experts: ExpertFleet | None = None
        self._autoscaler: Autoscaler | None = None
        self._operating = threading.Lock()  # operators and the autoscaler, one after the other; taken before _changing
        self._changing = threading.Lock()  # whoever changes a fleet or a map: not while waiting for room or processes
        self._queue = threading.BoundedSemaphore(_MOST_CHANGES)
        self._tracer = Tracer(self._roster.all, fleet.node_id, config.gateway.max_message)
        self._progress = Progress()
        self._asked: dict[str, Future[int]] = {}
        self._loaded: dict[str, int] = {}

    # -- start and stop -------------------------------------------------------------------------------------------

    def start(self, own: ActorHandle) -> Doors:
        """Bring everything up and return where the gateway listens. ``own`` is this controller, for the gateway.

        On any failure whatever was started is stopped and released before the error goes on.
        """
        try:
            with self._changing:
                return self._start(own, time.monotonic() + self._config.start_timeout_s)
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
        view = cluster_view(model_name(self._config.model), epoch, self._fleet, self._roster.all())
        view.transport = self._deployment.wires.rule
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
        """Another number of expert shards. Raises BadOperation, NoRoom, ChangeFailed, Busy."""
        with self._change(f"scaling experts to {shards}") as (experts, deadline):
            if not experts.least <= shards <= experts.most:
                raise BadOperation("shards", f"{shards}; allowed are {experts.least} to {experts.most}")
            read = self._scale_experts(experts, shards, deadline)
            assert experts.map is not None
            response = pb.ScaleExpertsResponse(expert_map_epoch=experts.map.epoch, experts_read=read)
            response.shards.extend(shard.name for shard in experts.shards)
            return response.SerializeToString()

    def scale_attention(self, replicas: int) -> bytes:
        """Another number of attention replicas. Raises BadOperation, NoRoom, ChangeFailed, Busy."""
        with self._change(f"scaling attention to {replicas}") as (experts, deadline):
            if not 1 <= replicas <= _MOST_REPLICAS:
                raise BadOperation("replicas", f"{replicas}; allowed are 1 to {_MOST_REPLICAS}")
            attention = self._attention
            with self._changing:  # in the middle of a repair a replica would count beside the vacancy that it fills
                missing = attention.missing(replicas)
            bundles = self._deployment.reserve(attention.requests(missing), left(deadline))
            started = attention.start(bundles, deadline)
            with self._changing:
                if started:
                    attention.add(started, experts, deadline)
                leaving = attention.leave(replicas)
            self._retire(leaving, experts)
            names = [replica.shard.name for replica in attention.staying]
            return pb.ScaleAttentionResponse(replicas=names).SerializeToString()

    def rebalance(self) -> bytes:
        """Spread the experts anew by the load that was counted. Raises ChangeFailed, Busy."""
        with self._change("rebalancing") as (experts, deadline), self._changing:
            read, before, after = experts.rebalance(deadline)
            assert experts.map is not None
            response = pb.RebalanceResponse(
                expert_map_epoch=experts.map.epoch, experts_read=read, imbalance_before=before, imbalance_after=after
            )
            return response.SerializeToString()

    def drain(self, actor: str, node: str, undo: bool) -> bytes:
        """Take one shard, or everything on a node, out of service; or with ``undo`` let a node be used again.

        Raises BadOperation, NoRoom, ChangeFailed, Busy.
        """
        with self._change(f"draining {actor or node}") as (experts, deadline):
            if undo:
                self._deployment.cordoned -= {find_node(node, self._fleet)}
                return pb.DrainResponse().SerializeToString()
            leaving = find_target(actor, node, self._fleet, experts, self._attention)
            cordoned = self._deployment.cordoned
            self._deployment.cordoned = cordoned | ({leaving.node} if leaving.node else set())
            try:
                started = self._drain(leaving, experts, deadline)
            except BaseException:
                self._deployment.cordoned = cordoned
                raise
            return pb.DrainResponse(stopped=leaving.names, started=started).SerializeToString()

    def trace(self, steps: int, timeout_s: float, caller: str) -> bytes:
        """What every actor does in the next steps. Holds no change up. Raises BadOperation, TraceRunning."""
        return self._tracer.trace(steps, timeout_s, caller).SerializeToString()

    def stop_trace(self, caller: str) -> None:
        """Nobody waits for the trace of ``caller`` any more."""
        self._tracer.stop(caller)

    # -- the steps of start ---------------------------------------------------------------------------------------

    def _start(self, own: ActorHandle, deadline: float) -> Doors:
        attention, home = self._attention, self._fleet.home()
        replicas = attention.requests(self._config.attention.replicas)
        count = first_count(self._config, self._fleet.nodes())
        shards = expert_requests(self._deployment, count)
        bundles = self._deployment.reserve(replicas + shards, left(deadline))
        self._deployment.settle_wires([bundle.node_id for bundle in bundles])
        self._progress.phase = "preparing the model"
        settings = self._deployment.settings([home, *(bundle.node_id for bundle in bundles)], deadline)
        spec = load_spec(settings.paths[home])
        if not self._config.experts.shards:  # there may be more nodes than a layer has experts
            count = min(count, shard_limits(self._config, spec)[1])
            for bundle in bundles[len(replicas) + count :]:
                self._deployment.release(bundle)
            bundles = bundles[: len(replicas) + count]
        check_shards(self._config, spec, count)
        self._progress.expert_shards = count
        experts = ExpertFleet(self._deployment, spec, lambda: attention.routers)
        self._progress.phase = "starting actors"
        gateway = self._gateways.spawn(deadline)
        spawned = experts.spawn(bundles[len(replicas) :], deadline)
        pairs = attention.spawn(bundles[: len(replicas)], deadline)
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
        self._repairs = Repairs(self._deployment, experts, attention, self._gateways, self._changing)
        doors = self._gateways.open(gateway, own, deadline)
        self._supervisor.start()
        experts.restore_spares(left(deadline), deadline)
        self._autoscaler = Autoscaler(
            self._config.experts.autoscale, self._events, experts, self._operating.locked, self._scale_by_load
        )
        self._autoscaler.start()
        return doors

    def _late(self) -> str:
        return f"not up within start_timeout_s ({self._config.start_timeout_s:g} s); last: {self._progress.phase}"

    def _ask_loaded(self, member: Member) -> None:
        asked = self._asked.get(member.name)
        if asked is None or asked.done():
            if asked is not None and asked.exception() is None:
                self._loaded[member.name] = asked.result()
            self._asked[member.name] = member.handle.begin("loaded_bytes")

    # -- changes that nobody asked for ----------------------------------------------------------------------------

    def _repair_failed(self, error: Exception) -> None:
        text = f"a repair failed and will be tried again: {type(error).__name__}: {error}"
        self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_FAILED, text)

    def _scale_by_load(self, wanted: int, reason: str) -> bool:
        """What the autoscaler decided. False, and nothing done, while something else is being changed."""
        if not self._operating.acquire(blocking=False):
            return False
        try:
            self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_SCALING_DECIDED, reason)
            self._scale_experts(self._ready(), wanted, self._deadline())
        finally:
            self._operating.release()
        return True

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _scale_experts(self, experts: ExpertFleet, count: int, deadline: float) -> int:
        """New shards are placed, started and filled before the map is held up for the change itself."""
        more = count - len(experts.living)
        if not more and count == experts.wanted:
            return 0
        requests = expert_requests(self._deployment, max(0, more))
        started = experts.start(self._deployment.reserve(requests, left(deadline)), deadline)
        return self._spread(experts, lambda: (experts.living + started)[:count], started, deadline)

    def _spread(
        self, experts: ExpertFleet, over: Callable[[], list[Member]], started: list[Member], deadline: float
    ) -> int:
        """Spread the experts over the shards that ``over()`` gives. On failure those that were ``started`` go."""
        try:
            shards, base = over(), experts.map
            new = experts.plan(shards)
            experts.read_ahead(new, started, deadline)
            with self._changing:
                if (shards, base) != (over(), experts.map):  # a repair has changed it meanwhile, or has to
                    if len(over()) < len(shards):
                        raise ActorUnreachable("an expert shard was lost meanwhile; it is being replaced")
                    new = experts.plan(over())
                return experts.change(new, started, deadline)
        except BaseException:
            experts.dismiss(started)
            raise

    def _drain(self, leaving: Leaving, experts: ExpertFleet, deadline: float) -> list[str]:
        """Successors first, where there are to be any; then the leaving ones go."""
        attention, elsewhere = self._attention, bool(leaving.node)
        requests = attention.requests(len(leaving.replicas) if elsewhere else 0)
        wanted = requests + expert_requests(self._deployment, len(leaving.shards) if elsewhere else 0)
        bundles = self._deployment.reserve(wanted, left(deadline))  # for all of them, before anything moves
        shards = experts.start(bundles[len(requests) :], deadline)
        if leaving.shards:
            self._spread(
                experts, lambda: [s for s in experts.living if s not in leaving.shards] + shards, shards, deadline
            )
        started = attention.start(bundles[: len(requests)], deadline)
        with self._changing:
            if started:
                attention.add(started, experts, deadline)
            attention.leave_these(leaving.replicas)
        self._retire(leaving.replicas, experts)
        experts.dismiss(leaving.spares)
        return [shard.name for shard in shards] + [new.replica.shard.name for new in started]

    def _retire(self, leaving: list[Replica], experts: ExpertFleet) -> None:
        if leaving:
            free = self._attention.retire(leaving)
            with self._changing:
                self._attention.part_with(free, experts, self._deadline())

    @contextmanager
    def _change(self, what: str) -> Iterator[tuple[ExpertFleet, float]]:
        """An operator's change, when the ones before are through. Whatever keeps it from working is told as an event.

        Raises Busy when too many wait already, ChangeFailed for what may happen to any change.
        """
        if not self._queue.acquire(blocking=False):
            raise Busy(f"{_MOST_CHANGES} changes are waiting or under way already")
        try:
            with self._operating:
                yield self._ready(), self._deadline()
        except (BadOperation, Stopping):
            raise
        except Exception as error:
            text = str(error) or f"not done within start_timeout_s ({self._config.start_timeout_s:g} s)"
            self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_FAILED, f"{what} failed: {text}")
            if isinstance(error, _MAY_HAPPEN):
                raise ChangeFailed(f"{what} failed: {text}") from error
            raise
        finally:
            self._queue.release()

    def _ready(self) -> ExpertFleet:
        if self._experts is None:
            raise BadOperation("cluster", "it is not up yet")
        return self._experts

    def _deadline(self) -> float:
        return time.monotonic() + self._config.start_timeout_s
