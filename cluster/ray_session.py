"""Joining or starting Ray, and what a dead cluster may have left in it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util import list_named_actors, placement_group_table
from ray.util.placement_group import get_placement_group, remove_placement_group

from cluster.config import ConfigError, ServerConfig
from cluster.ray_fleet import GROUP_PREFIX, NAMESPACE

log = logging.getLogger(__name__)

CONTROLLER = "controller"
_OBJECT_STORE_BYTES = 128 * 2**20  # nothing of ours travels through it


class AlreadyServing(RuntimeError):
    """The Ray cluster has a controller already."""


@contextmanager
def ray_session(config: ServerConfig) -> Iterator[None]:
    """Connect to the Ray cluster that the configuration names, or run one for as long as the block lasts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.ray.address
    if address == "local" or (address == "auto" and not _join("auto")):
        _start_local(config)
    elif address not in ("auto", "local") and not _join(address):
        raise ConfigError(f"ray.address: no Ray cluster answers at {address!r}; allowed: auto, local, or HOST:PORT")
    try:
        yield
    finally:
        ray.shutdown()


def sweep() -> None:
    """Remove actors and placement groups of a cluster whose controller is gone. Raises AlreadyServing if it is not."""
    names = [entry["name"] for entry in list_named_actors(all_namespaces=True) if entry["namespace"] == NAMESPACE]
    if CONTROLLER in names:
        raise AlreadyServing(
            "this Ray cluster is serving already; `expertmesh status` shows what, Ctrl-C there ends it"
        )
    for name in names:
        log.warning("removing the left-over actor %s", name)
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    for group in placement_group_table().values():
        if group["name"].startswith(GROUP_PREFIX) and group["state"] != "REMOVED":
            log.warning("removing the left-over placement group %s", group["name"])
            remove_placement_group(get_placement_group(group["name"]))


def _join(address: str) -> bool:
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="WARNING")
    except ConnectionError:
        return False
    return True


def _start_local(config: ServerConfig) -> None:
    """A cluster of this machine alone that ends with this process. Its CPUs are bookkeeping."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 would starve us beside anything else
    # it would only tell that token authentication is on, which is what we want, in the place of our own first line
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    wanted = config.attention.replicas * config.attention.cpus + config.experts.shards * config.experts.cpus
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=max(os.cpu_count() or 1, math.ceil(wanted)),
        labels={**config.attention.node_labels, **config.experts.node_labels},
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
        object_store_memory=_OBJECT_STORE_BYTES,
    )
