"""Repairs: what is done when somebody is reported, or has died. The supervisor calls it, and again if it raises."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cluster.attention_fleet import AttentionFleet
from cluster.deployment import ROOM_S, Deployment, ModelAbsent
from cluster.expert_fleet import ExpertFleet
from cluster.gateway_fleet import GatewayFleet
from cluster.roster import Member, Stopping

log = logging.getLogger(__name__)

_ONCE_IN_S = 30.0


class Repairs:
    """Holds ``changing`` while it changes a fleet or a map."""

    def __init__(
        self,
        deployment: Deployment,
        experts: ExpertFleet,
        attention: AttentionFleet,
        gateways: GatewayFleet,
        changing: threading.Lock,
    ) -> None:
        self._deployment = deployment
        self._experts = experts
        self._attention = attention
        self._gateways = gateways
        self._changing = changing
        self._trusted_from: dict[str, float] = {}

    def examine(self, suspects: frozenset[str]) -> None:
        """Some router has lost these expert shards: those that answer are connected anew, the others are lost. Or a
        gateway has lost attention shards: whether they live or not, they are of no use without it."""
        roster, experts = self._deployment.roster, self._experts
        with self._changing:
            for replica in [r for r in self._attention.replicas if r.shard.name in suspects]:
                roster.lose(replica.shard, "a gateway lost its wire")
            still = suspects & experts.missed()  # a repair may have settled what was reported
            members = [shard for shard in experts.living if shard.name in still]
            answers = experts.stats(members)
            for shard in members:
                if shard.name not in answers:
                    roster.lose(shard, "a router lost it, and it does not answer")
                elif time.monotonic() < self._trusted_from.get(shard.name, 0.0):
                    roster.lose(shard, "routers lose it again and again")
            if members and experts.living == experts.shards:  # else the map that replaces the dead does it
                if not self._deployment.wires.nccl:  # there one death makes all of them suspects
                    self._trusted_from.update({shard.name: time.monotonic() + _ONCE_IN_S for shard in members})
                experts.reconnect(self._deadline())

    def repair(self, lost: list[Member]) -> None:
        """Replace what died, each kind whether or not the others work out; then raise what did not.

        Where a successor's node has not got the model, others may change the cluster while it is fetched.
        """
        deadline = self._deadline()
        failures = self._replace(lost, deadline)
        while absent := sorted({failure.node_id for failure in failures if isinstance(failure, ModelAbsent)}):
            self._deployment.settings(absent, deadline)
            failures = self._replace(lost, deadline)
        self._attempt(failures, self._experts.restore_spares, ROOM_S, self._deadline())
        if failures:
            raise failures[0]

    def _replace(self, lost: list[Member], deadline: float) -> list[Exception]:
        """What did not work out."""
        failures: list[Exception] = []
        with self._changing:
            self._attempt(failures, self._experts.forget_spares, lost)
            self._attempt(failures, self._attention.forget, lost, self._experts, deadline)
            self._attempt(failures, self._experts.replace, lost, deadline)
            self._attempt(failures, self._attention.replace, self._experts, deadline)
            self._attempt(failures, self._gateways.replace, lost, deadline)
        return failures

    def _attempt(self, failures: list[Exception], part: Callable[..., object], *arguments: object) -> None:
        try:
            part(*arguments)
        except Stopping:
            raise
        except Exception as error:  # it is among the failures: what else died is to be replaced all the same
            log.warning("a repair failed", exc_info=True)
            failures.append(error)

    def _deadline(self) -> float:
        return time.monotonic() + self._deployment.config.start_timeout_s
