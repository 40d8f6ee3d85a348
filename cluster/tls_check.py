"""Refuses a node whose files for TLS between actors are missing or do not fit, before any actor starts there."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config import ConfigError, ServerConfig
from cluster.fleet import Fleet
from cluster.tls import wire_tls_problem

LOOK_S = 60.0
"""A node that has not looked at three files in this time is given up: a process has to start for it."""


class TlsCheck:
    """Asks each node once; nobody where wires are not encrypted."""

    def __init__(self, config: ServerConfig, fleet: Fleet) -> None:
        self._tls = config.data_plane.tls if config.transport != "local" else None
        self._fleet = fleet
        self._fit: set[str] = set()

    def after(self, node_ids: Sequence[str]) -> None:
        """Raise ConfigError, with what is wrong on each of these nodes, if anything is."""
        new = sorted(set(node_ids) - self._fit)
        if self._tls is None or not new:
            return
        found = self._fleet.on_nodes(new, wire_tls_problem, self._tls, timeout_s=LOOK_S)
        wrong = [f"node {n.address}: {found[n.node_id]}" for n in self._fleet.nodes() if found.get(n.node_id)]
        if wrong:
            raise ConfigError(". ".join(wrong))
        self._fit |= set(new)
