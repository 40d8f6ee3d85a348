"""What both fleets are built with: the configuration, room on nodes, and settings for the actors in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from expertmesh.v1.control_pb2 import ClusterEventKind

from cluster.config import AttentionConfig, ExpertsConfig, ServerConfig
from cluster.events import EventLog
from cluster.fleet import Bundle, Fleet
from cluster.gpus import GpuCheck
from cluster.model_source import resolve_model
from cluster.roster import Roster
from cluster.settings import SettingsFactory
from cluster.tls_check import TlsCheck
from cluster.wire_choice import may_take_nccl, refuse_far_pairs, wire_choice
from placement.spec import BundleRequest

PROCESS_START_S = 30.0
"""A new process that does not answer within this time is given up: its node may be dead."""


ROOM_S = 10.0
"""A repair waits so long for room, and tries again later: others may be waiting for theirs."""


class ModelAbsent(RuntimeError):
    """There is room on a node, but the model is not ready there. A repair lets others work while it is made so."""

    def __init__(self, node_id: str) -> None:
        super().__init__(f"the model is not ready on node {node_id} yet")
        self.node_id = node_id


class Deployment:
    """One per cluster. Bundles that it reserved are given back at the latest by ``release_all``. ``wires``: which
    medium each pair of actors takes."""

    def __init__(self, config: ServerConfig, fleet: Fleet, roster: Roster, events: EventLog) -> None:
        self.config = config
        self.fleet = fleet
        self.roster = roster
        self.events = events
        self.wires = wire_choice(config)
        self.cordoned: frozenset[str] = frozenset()
        self._bundles: dict[str, Bundle] = {}
        self._settings = SettingsFactory(config, {}, self.wires.nccl)
        self._gpus = GpuCheck(config, fleet)
        self._tls = TlsCheck(config, fleet)

    @property
    def nodes(self) -> set[str]:
        """Those with room for an attention or an expert shard."""
        return {bundle.node_id for bundle in self._bundles.values()}

    def request(self, prefix: str, fleet: AttentionConfig | ExpertsConfig, actors: int = 1) -> BundleRequest:
        """What a new shard of this fleet needs of its node, with whatever lives beside it: ``actors`` together."""
        gpus = fleet.gpus if self.config.device == "cuda" else 0.0
        return BundleRequest(self.roster.fresh_name(prefix), fleet.cpus, fleet.node_labels, gpus, actors)

    def reserve(self, requests: Sequence[BundleRequest], timeout_s: float) -> list[Bundle]:
        """One bundle per request, on nodes that are not cordoned. All or none.

        Raises NoRoom, and ConfigError when a node cannot do what the configuration asks of it.
        """
        self._gpus.before(requests, [node for node in self.fleet.nodes() if node.node_id not in self.cordoned])
        bundles = self.fleet.reserve(requests, timeout_s, self.cordoned)
        self._bundles.update((bundle.name, bundle) for bundle in bundles)
        try:
            refuse_far_pairs(self.wires, self.fleet.home(), list(self._bundles.values()))
            nodes = [bundle.node_id for bundle in bundles]
            self._gpus.after(nodes)
            self._tls.after(nodes)
        except BaseException:
            for bundle in bundles:
                self.release(bundle)
            raise
        return bundles

    def settle_wires(self, node_ids: Sequence[str]) -> None:
        """Before the first actor starts: decide, for good, whether rows go over NCCL between the actors on these nodes.

        Raises ConfigError when the controller's node, where the gateway will be, cannot encrypt as configured.
        """
        self._tls.after([self.fleet.home()])
        if may_take_nccl(self.config):
            lacking = self._gpus.lacks_nccl(node_ids)
            self.wires = replace(self.wires, nccl=not lacking, why_not_nccl=lacking)
            self._settings = replace(self._settings, nccl=self.wires.nccl)
        self.events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_WIRES_CHOSEN, f"wires: {self.wires.rule}")

    def renew(self, bundle: Bundle | None, request: BundleRequest, timeout_s: float) -> Bundle:
        """Room for the successor of a dead actor: its bundle, renamed, or a new one if its node is gone.

        Raises ModelAbsent, having given the room back, where ``settings`` would have to wait for the model.
        """
        alive = {node.node_id for node in self.fleet.nodes() if node.alive} - self.cordoned
        if bundle is not None and bundle.node_id in alive and self._bundles.pop(bundle.name, None) is not None:
            self._bundles[request.name] = replace(bundle, name=request.name)
            return self._bundles[request.name]
        self.release(bundle)
        new = self.reserve([request], min(timeout_s, ROOM_S))[0]
        if new.node_id not in self._settings.paths:
            self.release(new)
            raise ModelAbsent(new.node_id)
        return new

    def release(self, bundle: Bundle | None) -> None:
        """Give a bundle back. Idempotent."""
        if bundle is not None and self._bundles.pop(bundle.name, None) is not None:
            self.fleet.release(bundle)

    def release_all(self) -> None:
        """Give back whatever is reserved."""
        for bundle in list(self._bundles.values()):
            self.release(bundle)

    def settings(self, nodes: Sequence[str], deadline: float) -> SettingsFactory:
        """Settings for actors on these nodes; the model is made ready on those that do not have it yet.

        That may take as long as a download. Raises what ``resolve_model`` does on any of them, and TimeoutError after
        ``deadline`` (absolute, monotonic).
        """
        new = sorted(set(nodes) - self._settings.paths.keys())
        if new:
            ready = self.fleet.on_nodes(new, resolve_model, self.config.model, timeout_s=left(deadline))
            self._settings.paths.update(ready)
        return self._settings


def left(deadline: float) -> float:
    """Seconds until ``deadline`` (absolute, monotonic); TimeoutError when it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
