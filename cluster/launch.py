"""A running cluster for as long as a block lasts: over Ray, or in this process for ``transport: local``."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from typing import Any

from cluster.config import ServerConfig
from cluster.controller import Controller, Progress
from cluster.fleet import ActorHandle, ActorUnreachable

_PROGRESS_S = 0.25
_STOP_TIMEOUT_S = 60.0

OnProgress = Callable[[Progress], None]


@contextmanager
def running_cluster(config: ServerConfig, on_progress: OnProgress = lambda _: None) -> Iterator[str]:
    """Start everything, give the gateway's "HOST:PORT", stop everything when the block is left.

    Errors of the start (NoRoom, CheckpointError, PortInUse, ...) come as they are; nothing is left running then.
    """
    launch = _local_controller if config.transport == "local" else _ray_controller
    with launch(config) as controller:
        on_progress(Progress())
        start = controller.begin("start", controller)
        _await_start(controller, start, config.start_timeout_s, on_progress)
        yield start.result()


def _await_start(controller: ActorHandle, start: Future[Any], timeout_s: float, on_progress: OnProgress) -> None:
    """Report progress a few times a second until the controller has answered or has had its time."""
    for _ in range(int((timeout_s + _STOP_TIMEOUT_S) / _PROGRESS_S)):
        try:
            start.result(_PROGRESS_S)
        except FutureTimeout:
            if start.done():
                raise
            on_progress(controller.call("progress", timeout_s=_STOP_TIMEOUT_S))
        else:
            return
    raise TimeoutError("the controller did not finish its start")


@contextmanager
def _local_controller(config: ServerConfig) -> Iterator[ActorHandle]:
    from cluster.local_fleet import LocalFleet, LocalHandle

    fleet = LocalFleet()
    controller = Controller(config, fleet)
    try:
        yield LocalHandle("controller", controller, fleet.pool)
    finally:
        controller.stop()
        fleet.close()


@contextmanager
def _ray_controller(config: ServerConfig) -> Iterator[ActorHandle]:
    from cluster.ray_fleet import start_controller
    from cluster.ray_session import CONTROLLER, ray_session, sweep

    with ray_session(config):
        sweep()
        controller = start_controller(CONTROLLER, config, secrets.token_bytes(32))
        try:
            yield controller
        finally:
            _stop(controller)


def _stop(controller: ActorHandle) -> None:
    import ray

    from cluster.ray_fleet import RayHandle

    assert isinstance(controller, RayHandle)
    # one that does not answer any more leaves its actors to the next start's sweep; those of a local Ray end with it
    with suppress(ActorUnreachable, FutureTimeout):
        controller.call("stop", timeout_s=_STOP_TIMEOUT_S)
    ray.kill(controller.actor, no_restart=True)
