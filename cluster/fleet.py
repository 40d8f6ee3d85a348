"""What the controller needs from whatever runs the actors: ``RayFleet``, or ``LocalFleet`` (one process)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any

from cluster.actor_class import ActorClass
from placement.spec import BundleRequest, Node


class ActorUnreachable(RuntimeError):
    """The actor's process is gone or cannot be reached."""


@dataclass(frozen=True)
class Bundle:
    """Reserved room on a node. ``group`` is the placement group's id as text; ``handle`` is the fleet's own; ``gpus``
    is the part of a GPU for each actor inside."""

    name: str
    node_id: str
    group: str = ""
    index: int = 0
    handle: Any = None
    gpus: float = 0.0


class ActorHandle(ABC):
    """A running actor. Picklable, so that actors may be told of each other."""

    name: str

    @abstractmethod
    def begin(self, method: str, *args: Any) -> Future[Any]:
        """Call a method; the future gives its result, its exception, or ActorUnreachable.

        Callbacks of the future must not wait for anything: they run in a thread that answers come through.
        """

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call and wait. Raises TimeoutError after ``timeout_s`` seconds."""
        return self.begin(method, *args).result(timeout_s)


class Fleet(ABC):
    """Starts and ends actors. Plain classes go in; their last constructor argument is the endpoint factory."""

    @abstractmethod
    def home(self) -> str:
        """Node id of the controller."""

    @abstractmethod
    def nodes(self) -> list[Node]:
        """The machines there are."""

    @abstractmethod
    def reserve(
        self, requests: Sequence[BundleRequest], timeout_s: float, without: frozenset[str] = frozenset()
    ) -> list[Bundle]:
        """One bundle per request, spread over nodes, those of the ids ``without`` left out. All or none.

        Raises placement.bundles.NoRoom.
        """

    @abstractmethod
    def on_nodes(
        self, node_ids: Sequence[str], function: Callable[..., Any], *args: Any, timeout_s: float
    ) -> dict[str, Any]:
        """Run ``function(*args)`` once on each of the nodes, at the same time; results by node id.

        Raises the first node's error as soon as there is one, and TimeoutError, naming the nodes that it waits for,
        after ``timeout_s`` seconds.
        """

    @abstractmethod
    def spawn(self, role: ActorClass, name: str, bundle: Bundle | None, *args: Any) -> ActorHandle:
        """Start ``role(name, *args, make_endpoint)`` in ``bundle``, or on the controller's node for None."""

    @abstractmethod
    def node_id(self, handle: ActorHandle) -> str:
        """Where the actor runs."""

    @abstractmethod
    def watch(self, handle: ActorHandle) -> Future[None]:
        """Done, with ActorUnreachable, as soon as the actor's process has ended, whoever ended it."""

    @abstractmethod
    def kill(self, handle: ActorHandle) -> None:
        """End the actor's process at once. Idempotent."""

    @abstractmethod
    def release(self, bundle: Bundle) -> None:
        """Give a bundle back. Idempotent."""


def first_failure_or_all(calls: Mapping[str, Future[Any]], timeout_s: float) -> dict[str, Any]:
    """The results by node id; see :meth:`Fleet.on_nodes` for what is raised. Calls that go on then are the caller's."""
    done, waiting = wait(calls.values(), timeout_s, FIRST_EXCEPTION)
    for call in done:
        if (error := call.exception()) is not None:
            raise error
    if waiting:
        late = ", ".join(node_id for node_id, call in calls.items() if call in waiting)
        raise TimeoutError(f"not done within {timeout_s:.0f} s on {late}")
    return {node_id: call.result() for node_id, call in calls.items()}
