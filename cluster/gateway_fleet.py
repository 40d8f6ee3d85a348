"""GatewayFleet: the way in. One gateway, at one address for as long as the cluster runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from expertmesh.v1.control_pb2 import Role

from cluster.attention_fleet import AttentionFleet
from cluster.deployment import Deployment, left
from cluster.fleet import ActorHandle
from cluster.gateway.server import Gateway
from cluster.loss_watch import LossWatch
from cluster.roster import Member


class GatewayFleet:
    """The gateway of a cluster, on the controller's node. ``losses`` is told of it."""

    def __init__(self, deployment: Deployment, attention: AttentionFleet, losses: LossWatch) -> None:
        self._deployment = deployment
        self._attention = attention
        self._losses = losses
        self._controller: ActorHandle | None = None
        self._address = ""

    def spawn(self) -> Member:
        """A gateway that has still to ``load`` and to ``open``."""
        home = self._deployment.fleet.home()
        settings = self._deployment.settings([home]).gateway(home)
        if self._address:  # its predecessor's, where clients look for it
            settings = replace(settings, port=int(self._address.rpartition(":")[2]))
        roster = self._deployment.roster
        return roster.spawn(Role.ROLE_GATEWAY, Gateway, roster.fresh_name("gateway"), None, settings)

    def open(self, gateway: Member, controller: ActorHandle, deadline: float) -> str:
        """Connect it to the attention shards and let clients in. Returns "HOST:PORT"."""
        self._controller = controller
        arguments = (self._attention.peers, controller, self._deployment.medium, left(deadline))
        gateway.handle.call("connect", *arguments, timeout_s=left(deadline))
        self._address = str(gateway.handle.call("serve", timeout_s=left(deadline)))
        self._losses.follow(gateway)
        return self._address

    def replace(self, lost: Sequence[Member], deadline: float) -> None:
        """A new one at the same address, if it is among the lost; its streams went with it, clients resume them."""
        roster = self._deployment.roster
        if not any(member.role == Role.ROLE_GATEWAY for member in lost) or roster.of(Role.ROLE_GATEWAY):
            return
        assert self._controller is not None
        gateway = self.spawn()
        try:
            gateway.handle.call("load", timeout_s=left(deadline))
            self.open(gateway, self._controller, deadline)
        except BaseException:
            roster.discard(gateway, "it could not open")
            raise
