"""Work on several nodes at once, and models that a node has not got yet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import deployment as deployment_module
from cluster import ray_fleet
from cluster.config import load_config
from cluster.deployment import Deployment, ModelAbsent
from cluster.events import EventLog
from cluster.fleet import Bundle, first_failure_or_all
from cluster.local_fleet import LocalFleet
from cluster.ray_fleet import RayFleet
from cluster.repairs import Repairs
from cluster.roster import Roster
from placement.spec import BundleRequest, Node

PATIENCE_S = 20.0


def of(result: Any) -> Future[Any]:
    """A call that has ended."""
    call: Future[Any] = Future()
    if isinstance(result, BaseException):
        call.set_exception(result)
    else:
        call.set_result(result)
    return call


class Nodes(LocalFleet):
    """Two of them; bundles go to those of ``room``. Notes the timeouts of what runs there."""

    def __init__(self) -> None:
        super().__init__()
        self.room = ["old"]
        self.timeouts: list[float] = []
        self.held: set[str] = set()

    def nodes(self) -> list[Node]:
        """See Fleet."""
        return [Node(name, "127.0.0.1", cpus_free=4.0) for name in ("old", "new")]

    def reserve(
        self, requests: Sequence[BundleRequest], timeout_s: float, without: frozenset[str] = frozenset()
    ) -> list[Bundle]:
        """See Fleet."""
        self.held |= {request.name for request in requests}
        return [Bundle(request.name, self.room[0]) for request in requests]

    def release(self, bundle: Bundle) -> None:
        """See Fleet."""
        self.held.discard(bundle.name)

    def on_nodes(
        self, node_ids: Sequence[str], function: Callable[..., Any], *args: Any, timeout_s: float
    ) -> dict[str, Any]:
        """See Fleet."""
        self.timeouts.append(timeout_s)
        return super().on_nodes(node_ids, function, *args, timeout_s=timeout_s)


@pytest.fixture
def fleet() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


@pytest.fixture
def deployment(fleet: Nodes, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """Whose nodes resolve their model to a folder that nobody looks into."""
    monkeypatch.setattr(deployment_module, "resolve_model", Path)
    events = EventLog()
    config = load_config(None, {"model": "/model", "start_timeout_s": PATIENCE_S})
    return Deployment(config, fleet, Roster(fleet, events, lambda member: None), events)


# -- on several nodes ------------------------------------------------------------------------------------------------


def test_the_first_failure_is_told_while_others_work_on() -> None:
    calls = {"slow": Future[Any](), "refuses": of(ValueError("no such model")), "done": of(1)}
    began = time.monotonic()
    with pytest.raises(ValueError, match="no such model"):
        first_failure_or_all(calls, PATIENCE_S)
    assert time.monotonic() - began < PATIENCE_S / 2
    assert first_failure_or_all({"a": of(1), "b": of(2)}, PATIENCE_S) == {"a": 1, "b": 2}


def test_nodes_that_are_late_are_named() -> None:
    with pytest.raises(TimeoutError, match=r"^not done within 0 s on n1, n3$"):
        first_failure_or_all({"n1": Future(), "n2": of(1), "n3": Future()}, 0.0)


def test_a_thread_of_one_process_keeps_to_the_time(fleet: Nodes) -> None:
    going_on = threading.Event()
    assert fleet.on_nodes(["a", "b"], str, 5, timeout_s=PATIENCE_S) == {"a": "5", "b": "5"}
    with pytest.raises(TimeoutError, match="on old"):
        fleet.on_nodes(["old"], going_on.wait, timeout_s=0.01)
    going_on.set()


class FakeRay:
    """As much of Ray as runs a function on nodes: there, a call's outcome by node is what ``outcomes`` says."""

    def __init__(self, outcomes: dict[str, Future[Any]]) -> None:
        self.outcomes = outcomes
        self.cancelled: list[tuple[str, bool]] = []

    def remote(self, max_calls: int) -> Callable[[Any], Any]:
        """As ``ray.remote``."""
        return lambda function: self

    def options(self, scheduling_strategy: Any, **_: Any) -> Any:
        """As a remote function's."""
        node_id = scheduling_strategy.node_id
        call = SimpleNamespace(node_id=node_id, future=lambda: self.outcomes[node_id])
        return SimpleNamespace(remote=lambda *args: call)

    def cancel(self, call: Any, force: bool) -> None:
        """As ``ray.cancel``."""
        self.cancelled.append((call.node_id, force))


NODES = ("a" * 56, "b" * 56)


@pytest.mark.parametrize("failure", ["an error", "time is up"])
def test_tasks_that_nobody_waits_for_any_more_are_killed(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    """A download that goes on would hold the node's lock on it, and its disk and network."""
    outcomes = {NODES[0]: Future[Any](), NODES[1]: of(OSError("disk full") if failure == "an error" else 1)}
    ray = FakeRay(outcomes)
    monkeypatch.setattr(ray_fleet, "ray", ray)
    wanted = OSError if failure == "an error" else TimeoutError
    with pytest.raises(wanted):
        RayFleet.on_nodes(object.__new__(RayFleet), NODES, str, timeout_s=PATIENCE_S if wanted is OSError else 0.01)
    assert (NODES[0], True) in ray.cancelled


def test_tasks_that_end_well_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay({node_id: of(node_id[0]) for node_id in NODES})
    monkeypatch.setattr(ray_fleet, "ray", ray)
    got = RayFleet.on_nodes(object.__new__(RayFleet), NODES, str, timeout_s=PATIENCE_S)
    assert got == dict(zip(NODES, "ab", strict=True))
    assert ray.cancelled == []


# -- the model on nodes ----------------------------------------------------------------------------------------------


def test_a_model_is_waited_for_until_the_deadline(fleet: Nodes, deployment: Deployment) -> None:
    assert deployment.settings(["old"], time.monotonic() + 7.0).paths == {"old": Path("/model")}
    (timeout_s,) = fleet.timeouts
    assert 6.0 < timeout_s <= 7.0
    deployment.settings(["old"], time.monotonic() - 1.0)  # it is there already
    with pytest.raises(TimeoutError):
        deployment.settings(["old", "new"], time.monotonic() - 1.0)
    assert len(fleet.timeouts) == 1


def test_a_successor_on_a_node_without_the_model_is_put_off(fleet: Nodes, deployment: Deployment) -> None:
    deployment.settings(["old"], time.monotonic() + PATIENCE_S)
    request = deployment.request("expert", deployment.config.experts)
    bundle = deployment.renew(None, request, PATIENCE_S)
    fleet.room = ["new"]
    with pytest.raises(ModelAbsent, match="not ready on node new yet"):
        deployment.renew(None, deployment.request("expert", deployment.config.experts), PATIENCE_S)
    assert fleet.held == {bundle.name}
    deployment.settings(["new"], time.monotonic() + PATIENCE_S)
    assert deployment.renew(None, request, PATIENCE_S).node_id == "new"


class Experts:
    """An expert fleet of which one shard has died."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.replaced: list[str] = []
        self.spares_until: list[float] = []

    def forget_spares(self, lost: object) -> None:
        """See ExpertFleet."""

    def replace(self, lost: object, deadline: float) -> None:
        """See ExpertFleet."""
        request = self.deployment.request("expert", self.deployment.config.experts)
        bundle = self.deployment.renew(None, request, 1.0)
        self.deployment.settings([bundle.node_id], deadline)
        self.replaced.append(bundle.node_id)

    def restore_spares(self, room_s: float, deadline: float) -> None:
        """See ExpertFleet."""
        self.spares_until.append(deadline)


def test_a_repair_lets_others_change_the_cluster_while_a_node_fetches_the_model(
    fleet: Nodes, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing, free = threading.Lock(), list[bool]()
    experts = Experts(deployment)
    nothing = SimpleNamespace(forget=lambda *_: None, replace=lambda *_: None)
    repairs = Repairs(deployment, experts, nothing, nothing, changing)  # type: ignore[arg-type]

    def fetch(model: str) -> Path:
        free.append(changing.acquire(timeout=5.0))
        changing.release()
        return Path(model)

    monkeypatch.setattr(deployment_module, "resolve_model", fetch)
    fleet.room = ["new"]
    repairs.repair([])
    assert (free, experts.replaced, len(experts.spares_until)) == ([True], ["new"], 1)
    assert not changing.locked()


def test_a_repair_whose_model_cannot_be_fetched_says_why(
    fleet: Nodes, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: str) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(deployment_module, "resolve_model", refuse)
    experts = Experts(deployment)
    nothing = SimpleNamespace(forget=lambda *_: None, replace=lambda *_: None)
    with pytest.raises(OSError, match="disk full"):
        Repairs(deployment, experts, nothing, nothing, threading.Lock()).repair([])  # type: ignore[arg-type]
    assert (experts.replaced, fleet.held) == ([], set())
