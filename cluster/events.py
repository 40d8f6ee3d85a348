"""What happened to the cluster, for whoever watches: a bounded log with a sequence number an entry."""

from __future__ import annotations

import logging
import threading
from collections import deque

from expertmesh.v1.control_pb2 import ClusterEvent, ClusterEventKind

log = logging.getLogger(__name__)

REMEMBERED = 256


class EventLog:
    """Thread-safe. Entries are ``expertmesh.v1.ClusterEvent``."""

    def __init__(self) -> None:
        self._events: deque[ClusterEvent] = deque(maxlen=REMEMBERED)
        self._sequence = 0
        self._told = threading.Condition()
        self._closed = False

    def tell(self, kind: ClusterEventKind, message: str, actor: str = "", epoch: int = 0) -> None:
        """Add one entry; it goes to the log of the process as well."""
        level = logging.ERROR if kind == ClusterEventKind.CLUSTER_EVENT_KIND_FAILED else logging.INFO
        log.log(level, "%s", message)
        with self._told:
            self._sequence += 1
            event = ClusterEvent(
                sequence=self._sequence, kind=kind, actor=actor, expert_map_epoch=epoch, message=message
            )
            event.time.GetCurrentTime()
            self._events.append(event)
            self._told.notify_all()

    def latest(self, count: int) -> list[ClusterEvent]:
        """The last ``count`` entries, oldest first."""
        with self._told:
            return list(self._events)[-count:]

    def after(self, sequence: int, timeout_s: float) -> list[ClusterEvent]:
        """Entries after this one, oldest first; waits for the first of them, empty after ``timeout_s``."""
        with self._told:
            self._told.wait_for(lambda: self._sequence > sequence or self._closed, timeout_s)
            return [event for event in self._events if event.sequence > sequence]

    def close(self) -> None:
        """Nobody waits from now on."""
        with self._told:
            self._closed = True
            self._told.notify_all()
