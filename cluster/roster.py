"""Who is on duty: every actor that the controller started, from its start to its end."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from expertmesh.v1.control_pb2 import ClusterEventKind, Role

from cluster.actor_class import ActorClass
from cluster.calls import LIFE_TIMEOUT_S, answers
from cluster.events import EventLog
from cluster.fleet import ActorHandle, Bundle, Fleet

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 15.0


class Stopping(RuntimeError):
    """The cluster is being stopped: nothing is started any more."""


@dataclass(frozen=True, eq=False)
class Member:
    """An actor on duty. Shards and routers live in a ``bundle``."""

    role: Role
    handle: ActorHandle
    bundle: Bundle | None

    @property
    def name(self) -> str:
        """The actor's name; names are not used twice."""
        return self.handle.name


class Roster:
    """Starts actors and ends them; ``on_lost(member)`` is called when one ends by itself. Thread-safe."""

    def __init__(self, fleet: Fleet, events: EventLog, on_lost: Callable[[Member], None]) -> None:
        self.fleet = fleet
        self._events = events
        self._on_lost = on_lost
        self._members: dict[str, Member] = {}
        self._numbers: dict[str, itertools.count[int]] = {}
        self._lock = threading.Lock()
        self._stopping = False
        # not in the thread that tells of an end: it is Ray's own, and Ray's calls made there would wait for themselves
        self._reaper = ThreadPoolExecutor(1, thread_name_prefix="reaper")

    def fresh_name(self, prefix: str) -> str:
        """``prefix-N``, N counting up: a name never means two different actors."""
        with self._lock:
            return f"{prefix}-{next(self._numbers.setdefault(prefix, itertools.count()))}"

    def of(self, role: Role) -> list[Member]:
        """The actors of a role, in the order in which they were started."""
        with self._lock:
            return [member for member in self._members.values() if member.role == role]

    def all(self) -> list[Member]:
        """Everybody on duty."""
        with self._lock:
            return list(self._members.values())

    def find(self, name: str) -> Member | None:
        """The actor of this name."""
        with self._lock:
            return self._members.get(name)

    def spawn(self, role: Role, cls: ActorClass, name: str, bundle: Bundle | None, *args: Any) -> Member:
        """Start ``cls(name, *args, make_endpoint)``. Raises Stopping once ``close`` was called."""
        if self._stopping:
            raise Stopping("the cluster is being stopped")
        member = Member(role, self.fleet.spawn(cls, name, bundle, *args), bundle)
        with self._lock:
            self._members[name] = member
        self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_ACTOR_STARTED, f"{name} is being started", name)
        self.fleet.watch(member.handle).add_done_callback(lambda end: self._ended(member, end))
        return member

    def end(self, member: Member) -> None:
        """Ask an actor to stop in order, then end its process. Its bundle stays."""
        if not self._forget(member):
            return
        try:
            member.handle.call("stop", timeout_s=_STOP_TIMEOUT_S)
        except Exception as error:  # whatever it is: the process is ended all the same
            log.warning("%s did not stop in order: %r", member.name, error)
        self.fleet.kill(member.handle)
        self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_ACTOR_STOPPED, f"{member.name} was stopped", member.name)

    def discard(self, member: Member, reason: str) -> bool:
        """End an actor's process without asking: it is dead, or of no use. False if it was off duty already."""
        if not self._forget(member):
            return False
        self.fleet.kill(member.handle)
        self._events.tell(
            ClusterEventKind.CLUSTER_EVENT_KIND_ACTOR_LOST, f"{member.name} is lost: {reason}", member.name
        )
        return True

    def lose(self, member: Member, reason: str) -> None:
        """An actor is of no use any more: end its process and report its loss, as if it had died by itself."""
        if self.discard(member, reason):
            self._on_lost(member)

    def answering(self, members: Sequence[Member]) -> list[Member]:
        """Those that answer; the others are lost. One that hangs would keep everybody waiting, at each change anew."""
        came = answers({member.name: member.handle.begin("stats") for member in members}, LIFE_TIMEOUT_S)
        for member in members:
            if member.name not in came:
                self.lose(member, "it does not answer")
        return [member for member in members if member.name in came]

    def close(self) -> None:
        """Nothing is started from now on, and nobody is missed."""
        self._stopping = True
        self._reaper.shutdown(wait=False)

    def _forget(self, member: Member) -> bool:
        with self._lock:
            return self._members.pop(member.name, None) is not None

    def _ended(self, member: Member, end: Future[Any]) -> None:
        if not self._stopping and not end.cancelled():
            with suppress(RuntimeError):  # closed in this moment
                self._reaper.submit(self.lose, member, "its process has ended")
