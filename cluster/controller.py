"""Controller: turns the configuration into a running cluster, and tells what runs where.

The main path is ``start``: place → spawn → load → connect → open the gateway. Nothing here is on the way of a token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from expertmesh.v1.control_pb2 import GetClusterResponse, Role

from actors.attention import AttentionShard
from actors.expert import ExpertShard
from actors.model.families import load_spec
from actors.router import Router
from actors.transport.base import Address, Medium
from cluster.config import ServerConfig
from cluster.fleet import ActorHandle, Bundle, Fleet
from cluster.gateway.server import AttentionPeer, Gateway
from cluster.model_source import model_name, resolve_model
from cluster.settings import SettingsFactory
from cluster.view import Member, cluster_view
from placement.expert_map import ExpertMap, single_replica_map
from placement.spec import BundleRequest

log = logging.getLogger(__name__)

_STATS_TIMEOUT_S = 2.0
_STOP_TIMEOUT_S = 15.0
_READING = "reading weights"
_STOP_ORDER = (Role.ROLE_GATEWAY, Role.ROLE_ATTENTION, Role.ROLE_ROUTER, Role.ROLE_EXPERT)


class StartFailed(RuntimeError):
    """The cluster did not come up; everything that had been started is gone again."""


@dataclass
class Progress:
    """How far ``start`` is: what it does now, and weight bytes read so far."""

    phase: str = "placing actors"
    loaded_bytes: int = 0


@dataclass(frozen=True)
class _Pair:
    """An attention shard and the router beside it."""

    shard: ActorHandle
    router: ActorHandle


@dataclass
class _Members:
    """What was started."""

    handles: list[tuple[Role, ActorHandle, Bundle | None]] = field(default_factory=list)
    bundles: list[Bundle] = field(default_factory=list)

    def of(self, role: Role) -> list[ActorHandle]:
        return [handle for found, handle, _ in self.handles if found == role]


class Controller:
    """One per cluster. ``start`` once, ``stop`` once; ``view`` at any time between."""

    def __init__(self, config: ServerConfig, fleet: Fleet) -> None:
        self._config = config
        self._fleet = fleet
        self._home = fleet.home()
        self._members = _Members()
        self._map: ExpertMap | None = None
        self._progress = Progress()
        self._stopping = False
        self._asked: dict[str, Future[int]] = {}
        self._loaded: dict[str, int] = {}
        self._medium = None if config.transport in ("auto", "local") else Medium(config.transport)

    def start(self, own: ActorHandle) -> str:
        """Bring everything up and return the gateway's "HOST:PORT". ``own`` is this controller, for the gateway.

        On any failure whatever was started is stopped and released before the error goes on.
        """
        try:
            return self._start(own)
        except TimeoutError as error:
            self.stop()
            raise StartFailed(self._late()) from error
        except BaseException:
            self.stop()
            raise

    def progress(self) -> Progress:
        """For a progress bar while ``start`` runs. Never waits: it tells what the actors last said."""
        if self._progress.phase == _READING:
            for handle in (*self._members.of(Role.ROLE_EXPERT), *self._members.of(Role.ROLE_ATTENTION)):
                self._ask_loaded(handle)
            self._progress.loaded_bytes = sum(self._loaded.values())
        return self._progress

    def _ask_loaded(self, handle: ActorHandle) -> None:
        asked = self._asked.get(handle.name)
        if asked is None or asked.done():
            if asked is not None and asked.exception() is None:
                self._loaded[handle.name] = asked.result()
            self._asked[handle.name] = handle.begin("loaded_bytes")

    def view(self) -> bytes:
        """The cluster as a serialised ``expertmesh.v1.GetClusterResponse``."""
        members = [Member(role, handle, bundle) for role, handle, bundle in self._members.handles]
        epoch = self._map.epoch if self._map else 0
        view: GetClusterResponse = cluster_view(
            model_name(self._config.model), epoch, self._fleet, members, _STATS_TIMEOUT_S
        )
        return view.SerializeToString()

    def stop(self) -> None:
        """Drain the gateways, stop every actor, release every bundle; a start that still runs ends. Idempotent."""
        self._stopping = True
        members, self._members = self._members, _Members()
        for role in _STOP_ORDER:
            for handle in members.of(role):
                self._end(handle)
        for bundle in members.bundles:
            self._fleet.release(bundle)

    # -- the steps of start ---------------------------------------------------------------------------------------

    def _start(self, own: ActorHandle) -> str:
        deadline = time.monotonic() + self._config.start_timeout_s
        attention, experts = self._place(deadline)
        self._progress.phase = "preparing the model"
        nodes = sorted({self._home, *(bundle.node_id for bundle in (*attention, *experts))})
        settings = SettingsFactory(self._config, self._fleet.on_nodes(nodes, resolve_model, self._config.model))
        spec = load_spec(settings.paths[self._home])
        self._progress.phase = "starting actors"
        gateway = self._spawn(Role.ROLE_GATEWAY, Gateway, "gateway-0", None, settings.gateway(self._home))
        shards = {
            b.name: self._spawn(Role.ROLE_EXPERT, ExpertShard, b.name, b, settings.expert(b, experts)) for b in experts
        }
        pairs = [self._spawn_pair(n, b, settings, attention) for n, b in enumerate(attention)]
        self._map = single_replica_map(1, spec.moe_layers, spec.moe.n_experts, tuple(shards))
        addresses = self._load(gateway, shards, pairs, deadline)
        self._progress.phase = "connecting"
        self._connect(gateway, own, shards, pairs, addresses, deadline)
        return str(gateway.call("serve", timeout_s=_left(deadline)))

    def _late(self) -> str:
        return f"not up within start_timeout_s ({self._config.start_timeout_s:g} s); last: {self._progress.phase}"

    def _place(self, deadline: float) -> tuple[list[Bundle], list[Bundle]]:
        attention, experts = self._config.attention, self._config.experts
        requests = [
            BundleRequest(f"attention-{n}", attention.cpus, attention.node_labels) for n in range(attention.replicas)
        ] + [BundleRequest(f"expert-{n}", experts.cpus, experts.node_labels) for n in range(experts.shards)]
        bundles = self._fleet.reserve(requests, _left(deadline))
        self._members.bundles = bundles
        return bundles[: attention.replicas], bundles[attention.replicas :]

    def _spawn_pair(
        self, number: int, bundle: Bundle, settings: SettingsFactory, all_bundles: Sequence[Bundle]
    ) -> _Pair:
        """An attention shard and its router, in one bundle."""
        router = self._spawn(Role.ROLE_ROUTER, Router, f"router-{number}", bundle, settings.router(bundle))
        shard = self._spawn(
            Role.ROLE_ATTENTION,
            AttentionShard,
            bundle.name,
            bundle,
            settings.attention(bundle, all_bundles),
            settings.engine(bundle),
        )
        return _Pair(shard, router)

    def _spawn(self, role: Role, cls: type, name: str, bundle: Bundle | None, *args: Any) -> ActorHandle:
        if self._stopping:
            raise StartFailed("the cluster was stopped while it started")
        handle = self._fleet.spawn(cls, name, bundle, *args)
        self._members.handles.append((role, handle, bundle))
        return handle

    def _load(
        self, gateway: ActorHandle, shards: dict[str, ActorHandle], pairs: Sequence[_Pair], deadline: float
    ) -> dict[str, Address]:
        """Everybody reads its own part at the same time. Returns each data-plane address by actor name."""
        assert self._map is not None
        self._progress.phase = _READING
        loads = {name: h.begin("load", self._map.epoch, self._map.held_by(name)) for name, h in shards.items()}
        for pair in pairs:
            loads[pair.router.name] = pair.router.begin("load")
            loads[pair.shard.name] = pair.shard.begin("load")
        loads[gateway.name] = gateway.begin("load")
        return {name: load.result(_left(deadline)) for name, load in loads.items()}

    def _connect(
        self,
        gateway: ActorHandle,
        own: ActorHandle,
        shards: dict[str, ActorHandle],
        pairs: Sequence[_Pair],
        addresses: dict[str, Address],
        deadline: float,
    ) -> None:
        """Routers to every shard of the map, each attention shard to its router, the gateway to all of those."""
        experts = {name: addresses[name] for name in shards}
        for pair in pairs:
            pair.router.call("connect", self._map, experts, self._medium, _left(deadline), timeout_s=_left(deadline))
            router = addresses[pair.router.name]
            pair.shard.call("connect", router, self._medium, _left(deadline), timeout_s=_left(deadline))
        peers = [AttentionPeer(pair.shard, addresses[pair.shard.name]) for pair in pairs]
        gateway.call("connect", peers, own, self._medium, _left(deadline), timeout_s=_left(deadline))

    def _end(self, handle: ActorHandle) -> None:
        """Ask an actor to stop in order, then end its process; a dead one is only forgotten."""
        try:
            handle.call("stop", timeout_s=_STOP_TIMEOUT_S)
        except Exception as error:  # the others have to be stopped all the same
            log.warning("%s did not stop in order: %r", handle.name, error)
        self._fleet.kill(handle)


def _left(deadline: float) -> float:
    """Seconds until ``deadline``; TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
