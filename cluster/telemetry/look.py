"""A look at the cluster for whoever reads metrics, however often: at most one a second reaches the controller."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from expertmesh.v1 import control_pb2 as pb

from cluster.fleet import ActorHandle
from cluster.telemetry.figures import ClusterFigures, Figures

log = logging.getLogger(__name__)

_FRESH_S = 1.0
_TIMEOUT_S = 4.0
"""The controller itself gives an actor that does not answer two seconds."""


class ClusterLook:
    """The controller's view as figures. Thread-safe; whoever asks waits for the controller: not for the event loop."""

    def __init__(self, controller: ActorHandle, clock: Callable[[], float] = time.monotonic) -> None:
        self._controller = controller
        self._clock = clock
        self._lock = threading.Lock()
        self._figures = ClusterFigures()
        self._now: Figures | None = None
        self._fresh_until = float("-inf")
        self.closed = False

    def now(self) -> Figures | None:
        """What the controller answered within the last second, or answers now; None when it does not, and after
        ``close``. Figures of actors that keep it waiting may be some seconds older."""
        with self._lock:
            if self._clock() >= self._fresh_until and not self.closed:
                self._now = self._ask()
                self._fresh_until = self._clock() + _FRESH_S
            return None if self.closed else self._now

    def close(self) -> None:
        """Ask no more: the controller itself waits for the end of whoever owns this."""
        self.closed = True

    def _ask(self) -> Figures | None:
        try:
            answer = self._controller.begin("view").result(_TIMEOUT_S)
        except Exception as error:  # whatever it is: there are no figures, and that is a figure too
            if self._now is not None:
                log.warning("no figures of the cluster: the controller does not answer: %r", error)
            return None
        return self._figures.of(pb.GetClusterResponse.FromString(answer))
