"""All roles in one process, without Ray: the reference against which every distributed run is compared."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from actors.transport.local import LocalNetwork
from cluster.actor_class import ActorClass
from cluster.fleet import ActorHandle, ActorUnreachable, Bundle, Fleet, first_failure_or_all
from placement.bundles import NoRoom
from placement.spec import BundleRequest, Node

LOCAL_NODE = "local"


class LocalHandle(ActorHandle):
    """Calls methods of an object in this process, in a pool of threads, as a Ray actor with concurrency would."""

    def __init__(self, name: str, actor: Any, pool: ThreadPoolExecutor) -> None:
        self.name = name
        self.actor = actor
        self.ended: Future[None] = Future()
        self._ending = threading.Lock()
        self._pool = pool

    def begin(self, method: str, *args: Any) -> Future[Any]:
        """See ActorHandle. An actor that has ended is as unreachable as a dead process."""
        if not self.ended.done():
            with suppress(RuntimeError):  # the fleet is closed
                return self._pool.submit(getattr(self.actor, method), *args)
        unreachable: Future[Any] = Future()
        unreachable.set_exception(ActorUnreachable(f"{self.name} has ended"))
        return unreachable

    def end(self) -> None:
        """Make it unreachable, then stop the object. Idempotent."""
        with suppress(InvalidStateError):
            self.ended.set_exception(ActorUnreachable(f"{self.name} has ended"))
        with self._ending:  # whoever is told of the end may end it too
            self.actor.stop()


class LocalFleet(Fleet):
    """Actors as plain objects. ``close`` ends the pool of threads when every actor was stopped."""

    def __init__(self) -> None:
        self._network = LocalNetwork()
        self.pool = ThreadPoolExecutor(max_workers=32, thread_name_prefix="local-fleet")

    def home(self) -> str:
        """The one node."""
        return LOCAL_NODE

    def nodes(self) -> list[Node]:
        """This process, as one node."""
        return [Node(LOCAL_NODE, "127.0.0.1", cpus_free=math.inf, gpus_free=math.inf, gpus=math.inf)]

    def reserve(
        self, requests: Sequence[BundleRequest], timeout_s: float, without: frozenset[str] = frozenset()
    ) -> list[Bundle]:
        """Always room, on the one node there is."""
        if LOCAL_NODE in without and requests:
            raise NoRoom(f"bundle {requests[0].name}: the only node is drained")
        return [Bundle(request.name, LOCAL_NODE) for request in requests]

    def on_nodes(
        self, node_ids: Sequence[str], function: Callable[..., Any], *args: Any, timeout_s: float
    ) -> dict[str, Any]:
        """Run it here. What is not done in time goes on in its thread, for which ``close`` waits."""
        return first_failure_or_all({node_id: self.pool.submit(function, *args) for node_id in node_ids}, timeout_s)

    def spawn(self, role: ActorClass, name: str, bundle: Bundle | None, *args: Any) -> ActorHandle:
        """Make the object here."""
        return LocalHandle(name, role.load()(name, *args, self._network.endpoint), self.pool)

    def node_id(self, handle: ActorHandle) -> str:
        """The one node."""
        return LOCAL_NODE

    def watch(self, handle: ActorHandle) -> Future[None]:
        """Done when the object was ended."""
        assert isinstance(handle, LocalHandle)
        return handle.ended

    def kill(self, handle: ActorHandle) -> None:
        """Stop the object; there is no process of its own to end."""
        assert isinstance(handle, LocalHandle)
        handle.end()

    def release(self, bundle: Bundle) -> None:
        """Nothing was reserved."""

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=True)
