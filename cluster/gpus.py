"""Refuses a cluster that is to use GPUs where there are none, before any actor starts there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.config import ConfigError, ServerConfig
from cluster.fleet import Fleet
from placement.spec import BundleRequest, Node

LOOK_S = 120.0
"""A node that has not told in this time what it lacks is given up: a process that loads torch and CUDA has to start."""

_CHOSEN = "nccl, which transport: auto has taken,"

Missing = Callable[[], list[str]]
"""Run on a node: what is missing there."""


def cuda_missing() -> list[str]:
    """What this node lacks to compute on GPUs. Loads torch, where it is asked."""
    from actors.transport import cupy_nccl

    return cupy_nccl.cuda_missing()


def requirements_missing() -> list[str]:
    """What it lacks for NCCL."""
    from actors.transport import cupy_nccl

    return cupy_nccl.requirements_missing()


class GpuCheck:
    """Asks each node once. Without ``device: cuda`` and ``transport: nccl`` it asks nobody anything."""

    def __init__(self, config: ServerConfig, fleet: Fleet) -> None:
        self._fleet = fleet
        self._key, self._missing = _what_is_needed(config)
        self._fit: set[str] = set()

    def before(self, requests: Sequence[BundleRequest], nodes: Sequence[Node]) -> None:
        """Raise ConfigError if no node that may hold one of ``requests`` has a GPU: it would be waited for in vain."""
        for request in requests:
            fitting = [node for node in nodes if request.fits(node)]
            if request.gpus and fitting and not any(node.gpus for node in fitting):
                self._refuse(fitting, "Ray knows of no GPU there")

    def after(self, node_ids: Sequence[str]) -> None:
        """Raise ConfigError, with everything that is missing, if one of these nodes cannot do what is asked."""
        new = set(node_ids) - self._fit
        if self._missing is not None and new:
            self._refuse([node for node in self._fleet.nodes() if node.node_id in new])
            self._fit |= new

    def lacks_nccl(self, node_ids: Sequence[str]) -> str:
        """What keeps these nodes, which can compute on GPUs, from NCCL. If nothing does, a node that comes later and
        lacks it is refused: a group has no member without it."""
        wanted = set(node_ids)
        told = self._told([node for node in self._fleet.nodes() if node.node_id in wanted], requirements_missing)
        if not told:
            self._key, self._missing, self._fit = _CHOSEN, requirements_missing, wanted
        return told

    def _refuse(self, nodes: Sequence[Node], *more: str) -> None:
        assert self._missing is not None
        if told := self._told(nodes, self._missing, *more):
            raise ConfigError(f"{self._key} cannot be used: {told}")

    def _told(self, nodes: Sequence[Node], missing: Missing, *more: str) -> str:
        """What each node lacks that lacks something, as sentences."""
        found = self._fleet.on_nodes([node.node_id for node in nodes], missing, timeout_s=LOOK_S)
        return ". ".join(
            f"node {node.address}: {'; '.join([*more, *found[node.node_id]])}"
            for node in nodes
            if more or found[node.node_id]
        )


def _what_is_needed(config: ServerConfig) -> tuple[str, Missing | None]:
    """The key that asks for it, and what tells what is missing on a node."""
    if config.transport == "nccl":
        return "transport: nccl", requirements_missing
    return "device: cuda", cuda_missing if config.device == "cuda" else None
