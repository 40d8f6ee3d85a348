"""The one place where plain classes become Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.actor_class import RAY_CONTROLLER, ActorClass
from cluster.config import ServerConfig, TelemetryConfig
from cluster.controller import Controller
from cluster.fleet import ActorHandle, ActorUnreachable, Bundle, Fleet, first_failure_or_all
from cluster.hosted import Hosted, RayEndpoints
from placement.bundles import create_group, node_of, ray_nodes, remove_group, wait_for_group
from placement.spec import BundleRequest, Node
from placement.spread import spread

NAMESPACE = "expertmesh"

GROUP_PREFIX = "expertmesh-"

_CONCURRENCY = 16
"""Threads for control calls in an actor; the data plane has its own."""


class RayHandle(ActorHandle):
    """A Ray actor by its plain class's methods."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.actor = actor

    def begin(self, method: str, *args: Any) -> Future[Any]:
        """See ActorHandle."""
        return self._future(self.actor.call.options(name=f"{self.name}.{method}").remote(method, *args))

    def watch(self) -> Future[None]:
        """Done, with ActorUnreachable, when the actor's process has ended."""
        return self._future(self.actor.live.remote())

    def _future(self, call: Any) -> Future[Any]:
        result: Future[Any] = Future()
        call.future().add_done_callback(lambda done: self._settle(done, result))
        return result

    def _settle(self, done: Future[Any], result: Future[Any]) -> None:
        if result.cancelled():
            return
        error = done.exception()
        if isinstance(error, RayActorError):
            result.set_exception(ActorUnreachable(f"{self.name}: {_cause(error)}"))
        elif isinstance(error, RayTaskError):
            result.set_exception(error.cause)  # the error itself; Ray's wrapper carries a remote traceback as text
        elif error is not None:
            result.set_exception(error)
        else:
            result.set_result(done.result())


def _cause(error: RayActorError) -> str:
    """What Ray tells over many lines, in one: the error of a constructor that raised, else what became of the actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "creation task" in lines[0] else lines[0]


def start_actor(
    role: ActorClass, name: str, strategy: Any, gpus: float, telemetry: TelemetryConfig, *args: Any
) -> RayHandle:
    """Start ``role(*args)`` as a detached, named Ray actor. It sees the GPU of which it gets the part ``gpus``."""
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "num_gpus": gpus,
        "max_concurrency": _CONCURRENCY,
        "max_restarts": 0,
        "scheduling_strategy": strategy,
    }
    actor_class = ray.remote(type(role.name, (Hosted,), {}))
    return RayHandle(name, actor_class.options(**options).remote(telemetry, name, role, *args))


class AlreadyServing(RuntimeError):
    """The Ray cluster has a controller already."""


class RayController(Controller):
    """The controller as an actor: its fleet is made in its own process."""

    def __init__(self, config: ServerConfig, secret: bytes) -> None:
        super().__init__(config, RayFleet(secret, config))


def start_controller(name: str, config: ServerConfig, secret: bytes) -> RayHandle:
    """Start the controller on the node of this process. Raises AlreadyServing when another one was quicker."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        return start_actor(RAY_CONTROLLER, name, here, 0, config.telemetry, config, secret)
    except ValueError as error:
        raise AlreadyServing(f"this Ray cluster has a controller already: {error}") from error


class RayFleet(Fleet):
    """Actors in placement groups, one group of one bundle per shard. Lives in the controller's process."""

    def __init__(self, secret: bytes, config: ServerConfig) -> None:
        self._endpoints = RayEndpoints(secret, config.data_plane.tls)
        self._telemetry = config.telemetry
        self._home = ray.get_runtime_context().get_node_id()
        self._placed: dict[str, str] = {}

    def home(self) -> str:
        """The node of this process."""
        return self._home

    def nodes(self) -> list[Node]:
        """What Ray knows."""
        return ray_nodes()

    def reserve(
        self, requests: Sequence[BundleRequest], timeout_s: float, without: frozenset[str] = frozenset()
    ) -> list[Bundle]:
        """Create the groups all at once, then wait for each."""
        chosen = spread(requests, [node for node in self.nodes() if node.node_id not in without])
        groups: list[PlacementGroup] = []
        try:
            for request, node in zip(requests, chosen, strict=True):
                groups.append(create_group(GROUP_PREFIX + request.name, request, node, without))
            for group, request in zip(groups, requests, strict=True):
                wait_for_group(group, request, timeout_s)
        except BaseException:
            for group in groups:
                remove_group(group)
            raise
        return [
            Bundle(request.name, node_of(group), group.id.hex(), 0, group, request.gpus / request.actors)
            for request, group in zip(requests, groups, strict=True)
        ]

    def on_nodes(
        self, node_ids: Sequence[str], function: Callable[..., Any], *args: Any, timeout_s: float
    ) -> dict[str, Any]:
        """As Ray tasks that ask for no CPU. Their processes end with them: whoever has looked for GPUs goes on seeing
        those, and would be of no use as an actor's process. Those that nobody waits for any more are killed."""
        task = ray.remote(max_calls=1)(function)
        calls = {
            node_id: task.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(*args)
            for node_id in node_ids
        }
        try:
            return first_failure_or_all({node_id: call.future() for node_id, call in calls.items()}, timeout_s)
        except BaseException as error:
            for call in calls.values():
                ray.cancel(call, force=True)  # nothing, for those that are done
            raise (error.cause if isinstance(error, RayTaskError) else error) from None

    def spawn(self, role: ActorClass, name: str, bundle: Bundle | None, *args: Any) -> ActorHandle:
        """The bundle's CPUs are reserved by the group; the actors inside ask for none of their own. Of its GPU they ask
        for their parts: only then does Ray let them see it."""
        strategy: Any
        if bundle is None:
            strategy = NodeAffinitySchedulingStrategy(self._home, soft=False)
        else:
            strategy = PlacementGroupSchedulingStrategy(bundle.handle, bundle.index)
        self._placed[name] = bundle.node_id if bundle else self._home
        gpus = bundle.gpus if bundle else 0
        return start_actor(role, name, strategy, gpus, self._telemetry, name, *args, self._endpoints)

    def node_id(self, handle: ActorHandle) -> str:
        """Known since it was spawned."""
        return self._placed[handle.name]

    def watch(self, handle: ActorHandle) -> Future[None]:
        """By a call that never returns."""
        assert isinstance(handle, RayHandle)
        return handle.watch()

    def kill(self, handle: ActorHandle) -> None:
        """Kill without restart."""
        assert isinstance(handle, RayHandle)
        ray.kill(handle.actor, no_restart=True)

    def release(self, bundle: Bundle) -> None:
        """Remove the placement group."""
        remove_group(bundle.handle)
