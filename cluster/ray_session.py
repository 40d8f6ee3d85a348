"""Joining or starting Ray, and what a dead cluster may have left in it."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray._private.services import get_ray_address_from_environment
from ray.util import list_named_actors, placement_group_table
from ray.util.placement_group import get_placement_group, remove_placement_group

from cluster.config import ConfigError, ServerConfig
from cluster.ray_fleet import GROUP_PREFIX, NAMESPACE, AlreadyServing
from cluster.shard_counts import first_count
from placement.spec import Node

log = logging.getLogger(__name__)

CONTROLLER = "controller"
_PROBE_S = 5.0
_SWEEP_S = 10.0
_SWEEP_AGAIN_S = 0.1
_OBJECT_STORE_BYTES = 128 * 2**20  # nothing of ours travels through it


@contextmanager
def ray_session(config: ServerConfig) -> Iterator[None]:
    """Connect to the Ray cluster that the configuration names, or run one for as long as the block lasts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.ray.address
    if address == "local" or (address == "auto" and not join(address)):
        _start_local(config)
    elif address not in ("auto", "local") and not join(address):
        raise ConfigError(f"ray.address: no Ray cluster answers at {address!r}; allowed: auto, local, or HOST:PORT")
    try:
        yield
    finally:
        ray.shutdown()


def refuse_if_serving() -> None:
    """Raises AlreadyServing when this Ray cluster has a controller."""
    if CONTROLLER in _our_actors():
        raise AlreadyServing("this Ray cluster is serving already; end that one with Ctrl-C, or with `expertmesh stop`")


def sweep() -> list[str]:
    """Remove every actor and placement group of ours, whoever left them; returns their names.

    Looks again until nothing is left, for some seconds: Ray ends actors and registers groups in its own time, and a
    controller that is ended in the middle of a start may have asked for one more.
    """
    removed: dict[str, None] = {}
    deadline = time.monotonic() + _SWEEP_S
    while found := _our_actors() + _our_groups():
        removed.update(dict.fromkeys(found))
        for name in _our_actors():
            with suppress(ValueError):  # gone meanwhile
                ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
        for name in _our_groups():
            with suppress(ValueError):
                remove_placement_group(get_placement_group(name))
        if time.monotonic() > deadline:
            log.warning("still there after %g s: %s", _SWEEP_S, ", ".join(found))
            break
        time.sleep(_SWEEP_AGAIN_S)
    return list(removed)


def _our_groups() -> list[str]:
    groups = placement_group_table().values()
    return [g["name"] for g in groups if g["name"].startswith(GROUP_PREFIX) and g["state"] != "REMOVED"]


def _our_actors() -> list[str]:
    return [entry["name"] for entry in list_named_actors(all_namespaces=True) if entry["namespace"] == NAMESPACE]


def join(address: str) -> bool:
    """Connect to the Ray cluster at "HOST:PORT", or for "auto" to the one that RAY_ADDRESS names or that runs here.

    False when nobody is there. Raises ConfigError for what is not an address, and for a RAY_ADDRESS that is dead.
    """
    named = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if named == "auto" and not _runs_here():
        return False
    if named not in ("auto", "local") and not _answers(named):
        if address == "auto":
            raise ConfigError(f"RAY_ADDRESS: no Ray cluster answers at {named!r}")
        return False
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="WARNING")
    except ConnectionError:
        return False
    return True


def _runs_here() -> bool:
    """Whether a Ray cluster answers where Ray's own ``auto`` would look: a process of one on this machine, or the
    address that the last one left in a file. That one may have been killed, and Ray would wait a minute for it."""
    try:
        return _answers(get_ray_address_from_environment("auto", None))
    except ConnectionError:
        return False


def _answers(address: str) -> bool:
    """True if somebody listens at "HOST:PORT": Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"ray.address: {address!r}; allowed: auto, local, or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except OSError:
        return False
    return True


def _start_local(config: ServerConfig) -> None:
    """A cluster of this machine alone that ends with this process. Its CPUs are bookkeeping."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 would starve us beside anything else
    # it would only tell that token authentication is on, which is what we want, in the place of our own first line
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    attention, experts = config.attention.node_labels, config.experts.node_labels
    for key in attention.keys() & experts.keys():
        if attention[key] != experts[key]:
            raise ConfigError(
                f"experts.node_labels.{key}: {experts[key]!r}, but attention.node_labels has {attention[key]!r}: "
                "the fleets want different nodes, and a local Ray has one"
            )
    node = Node("local", "", math.inf, {**attention, **experts}, gpus_free=math.inf, gpus=math.inf)
    wanted = config.attention.replicas * config.attention.cpus + first_count(config, [node]) * config.experts.cpus
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=max(os.cpu_count() or 1, math.ceil(wanted)),
        labels=dict(node.labels),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
        object_store_memory=_OBJECT_STORE_BYTES,
    )
