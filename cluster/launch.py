"""A running cluster for as long as a block lasts: over Ray, or in this process for ``transport: local``."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import Any

from cluster.access import refuse_open_door
from cluster.config import ServerConfig
from cluster.controller import Controller, Progress, StartFailed
from cluster.fleet import ActorHandle, ActorUnreachable
from cluster.gateway.settings import Doors
from cluster.telemetry.process import process_telemetry

log = logging.getLogger(__name__)

_CONTROLLER_LOST = (
    "the controller has died: streams go on, but nothing can be changed or repaired; stop this and start it anew"
)
_PROGRESS_S = 0.25
_STOP_TIMEOUT_S = 60.0

OnProgress = Callable[[Progress], None]


@contextmanager
def running_cluster(config: ServerConfig, on_progress: OnProgress = lambda _: None) -> Iterator[Doors]:
    """Start everything, give the gateway's doors, stop everything when the block is left.

    Errors of the start (NoRoom, CheckpointError, PortInUse, ...) come as they are; nothing is left running then.
    """
    refuse_open_door(config)
    local = config.transport == "local"
    launch = _local_controller if local else _ray_controller
    with process_telemetry(config.telemetry, "local" if local else "serve"), launch(config) as controller:
        on_progress(Progress())
        start = controller.begin("start", controller)
        _await_start(controller, start, config.start_timeout_s, on_progress)
        on_progress(controller.call("progress", timeout_s=_STOP_TIMEOUT_S))
        yield start.result()


def _await_start(controller: ActorHandle, start: Future[Any], timeout_s: float, on_progress: OnProgress) -> None:
    """Report progress a few times a second until the controller has answered or has had its time."""
    for _ in range(int((timeout_s + _STOP_TIMEOUT_S) / _PROGRESS_S)):
        try:
            start.result(_PROGRESS_S)
        except FutureTimeout:
            if start.done():
                start.result()
                return
            on_progress(controller.call("progress", timeout_s=_STOP_TIMEOUT_S))
        else:
            return
    raise StartFailed(f"the controller did not finish its start within start_timeout_s ({timeout_s:g} s)")


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
    from cluster.ray_session import CONTROLLER, ray_session, refuse_if_serving, sweep

    with ray_session(config):
        refuse_if_serving()
        if left := sweep():
            log.warning("removed what an earlier cluster had left: %s", ", ".join(left))
        controller = start_controller(CONTROLLER, config, secrets.token_bytes(32))
        stopping = threading.Event()
        controller.watch().add_done_callback(lambda _: None if stopping.is_set() else log.error(_CONTROLLER_LOST))
        try:
            yield controller
        finally:
            stopping.set()
            _stop(controller)


def _stop(controller: ActorHandle) -> None:
    """In order if the controller answers; whatever is left then (it may be dead, or in the middle of a start) goes."""
    from cluster.ray_session import sweep

    try:
        controller.call("stop", timeout_s=_STOP_TIMEOUT_S)
    except (ActorUnreachable, FutureTimeout) as error:
        log.warning("the controller did not stop in order: %s", error or type(error).__name__)
    sweep()
