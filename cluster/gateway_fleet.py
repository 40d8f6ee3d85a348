"""GatewayFleet: the way in. One gateway, at one address for as long as the cluster runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from expertmesh.v1.control_pb2 import Role

from cluster.actor_class import GATEWAY
from cluster.attention_fleet import AttentionFleet
from cluster.deployment import Deployment, left
from cluster.fleet import ActorHandle
from cluster.gateway.settings import Doors, GatewaySettings
from cluster.loss_watch import LossWatch
from cluster.roster import Member


class GatewayFleet:
    """The gateway of a cluster, on the controller's node. ``losses`` is told of it."""

    def __init__(self, deployment: Deployment, attention: AttentionFleet, losses: LossWatch) -> None:
        self._deployment = deployment
        self._attention = attention
        self._losses = losses
        self._controller: ActorHandle | None = None
        self._doors: Doors | None = None

    def spawn(self, deadline: float) -> Member:
        """A gateway that has still to ``load`` and to ``open``."""
        home = self._deployment.fleet.home()
        settings = self._deployment.settings([home], deadline).gateway(home)
        if self._doors is not None:
            settings = _reopening(settings, self._doors)
        roster = self._deployment.roster
        return roster.spawn(Role.ROLE_GATEWAY, GATEWAY, roster.fresh_name("gateway"), None, settings)

    def open(self, gateway: Member, controller: ActorHandle, deadline: float) -> Doors:
        """Connect it to the attention shards and let clients in."""
        self._controller = controller
        arguments = (self._attention.peers, controller, self._deployment.wires.medium, left(deadline))
        gateway.handle.call("connect", *arguments, timeout_s=left(deadline))
        doors = gateway.handle.call("serve", timeout_s=left(deadline))
        assert isinstance(doors, Doors)
        self._doors = self._doors or doors  # the first one's: a successor may have to do without one of them
        self._losses.follow(gateway)
        return doors

    def replace(self, lost: Sequence[Member], deadline: float) -> None:
        """A new one at the same address, if it is among the lost; its streams went with it, clients resume them."""
        roster = self._deployment.roster
        if not any(member.role == Role.ROLE_GATEWAY for member in lost) or roster.of(Role.ROLE_GATEWAY):
            return
        assert self._controller is not None
        gateway = self.spawn(deadline)
        try:
            gateway.handle.call("load", timeout_s=left(deadline))
            self.open(gateway, self._controller, deadline)
        except BaseException:
            roster.discard(gateway, "it could not open")
            raise


def _reopening(settings: GatewaySettings, doors: Doors) -> GatewaySettings:
    """``settings`` with the ports of a predecessor's doors, where clients look for its successor."""

    def port(address: str) -> int | None:
        return int(address.rpartition(":")[2]) if address else None

    grpc = port(doors.grpc)
    assert grpc is not None
    return replace(
        settings,
        port=grpc,
        http_port=port(doors.http),
        health_port=port(doors.health),
        metrics_port=port(doors.metrics),
        succeeds=True,
    )
