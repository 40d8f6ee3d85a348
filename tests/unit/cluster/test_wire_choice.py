"""Which wire each pair takes: the rule, what keeps GPUs from NCCL, and forced media that cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from expertmesh.v1.control_pb2 import ClusterEventKind

from actors.transport.base import Medium
from cluster.config import ConfigError, load_config
from cluster.deployment import Deployment
from cluster.events import EventLog
from cluster.fleet import Bundle
from cluster.local_fleet import LocalFleet
from cluster.roster import Roster
from cluster.tls import wire_tls_problem
from cluster.wire_choice import WireChoice, may_take_nccl, refuse_far_pairs, wire_choice
from placement.spec import BundleRequest, Node

TLS = {"data_plane.tls": {"certificate": "/c.pem", "key": "/k.pem", "ca": "/ca.pem"}}
CUDA = {"device": "cuda"}
NO_CUPY = "cupy is not installed"


def choice(**keys: Any) -> WireChoice:
    return wire_choice(load_config(None, keys))


@pytest.mark.parametrize(
    ("keys", "medium", "nccl", "rule"),
    [
        ({}, None, False, "auto: shm on one node, tcp between nodes"),
        (TLS, None, False, "auto: shm on one node, tcp+tls between nodes"),
        ({"transport": "shm"}, Medium.SHM, False, "shm: shm"),
        ({"transport": "tcp"}, Medium.TCP, False, "tcp: tcp"),
        ({"transport": "tcp", **TLS}, Medium.TLS, False, "tcp: tcp+tls"),
        ({"transport": "local", **CUDA}, None, False, "local: all actors are in one process"),
        (
            {"transport": "nccl", **CUDA, **TLS},
            None,
            True,
            "nccl: nccl between routers and expert shards; else shm on one node, tcp+tls between nodes",
        ),
        (
            {**CUDA, **TLS},
            None,
            False,
            "auto: shm on one node, tcp+tls between nodes; not nccl: it does not encrypt, and data_plane.tls is set",
        ),
        (
            {**CUDA, "experts.gpus": 0.5},
            None,
            False,
            "auto: shm on one node, tcp between nodes; not nccl: experts.gpus is 0.5, and NCCL's members share no GPU",
        ),
    ],
)
def test_what_the_configuration_decides(keys: dict[str, Any], medium: Medium | None, nccl: bool, rule: str) -> None:
    made = choice(**keys)
    assert (made.medium, made.nccl, made.rule) == (medium, nccl, rule)


def test_only_auto_with_a_gpu_each_asks_the_nodes() -> None:
    assert may_take_nccl(load_config(None, CUDA))
    for keys in ({}, {**CUDA, **TLS}, {**CUDA, "attention.gpus": 0.5}, *({**CUDA, "transport": t} for t in ("tcp",))):
        assert not may_take_nccl(load_config(None, keys))


ON_TWO_NODES = [
    Bundle("attention-0", "a"),
    Bundle("attention-1", "a"),
    Bundle("expert-0", "a"),
    Bundle("expert-1", "b"),
]


@pytest.mark.parametrize(
    ("home", "bundles", "pair"),
    [
        ("a", ON_TWO_NODES, "router-0 is on node a and expert-1 on node b"),
        ("b", ON_TWO_NODES, "the gateway is on node b and attention-0 on node a"),
        ("a", [Bundle("attention-0", "a"), Bundle("expert-7", "b")], "router-0 is on node a and expert-7 on node b"),
    ],
)
def test_shared_memory_between_nodes_is_refused_with_the_pair(home: str, bundles: list[Bundle], pair: str) -> None:
    with pytest.raises(ConfigError, match=f"^transport: shm: {pair}, which share no memory; write auto or tcp"):
        refuse_far_pairs(choice(transport="shm"), home, bundles)
    for transport in ("auto", "tcp"):
        refuse_far_pairs(choice(transport=transport), home, bundles)
    refuse_far_pairs(choice(transport="shm"), "a", [bundle for bundle in bundles if bundle.node_id == "a"])


class Machines(LocalFleet):
    """Nodes with two GPUs; bundles go to those in ``order``, in turn; ``lacking`` is what each lacks for NCCL."""

    def __init__(self, order: Sequence[str], lacking: dict[str, list[str]] | None = None) -> None:
        super().__init__()
        self.order, self.lacking = list(order), lacking or {}
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.released: list[str] = []
        self.problems: dict[str, str] = {}

    def nodes(self) -> list[Node]:
        """See Fleet."""
        return [Node(n, f"10.0.0.{n}", 4.0, {}, True, 2.0, 2.0) for n in ("1", "2", "3")]

    def home(self) -> str:
        """See Fleet."""
        return "1"

    def on_nodes(
        self, node_ids: Sequence[str], function: Callable[..., Any], *args: Any, timeout_s: float
    ) -> dict[str, Any]:
        """See Fleet."""
        self.asked.append((function.__name__, tuple(node_ids)))
        if function is wire_tls_problem:
            return {node_id: self.problems.get(node_id) for node_id in node_ids}
        wanted = self.lacking if function.__name__ == "requirements_missing" else {}
        return {node_id: wanted.get(node_id, []) for node_id in node_ids}

    def reserve(
        self, requests: Sequence[BundleRequest], timeout_s: float, without: frozenset[str] = frozenset()
    ) -> list[Bundle]:
        """See Fleet."""
        return [Bundle(request.name, self.order.pop(0)) for request in requests]

    def release(self, bundle: Bundle) -> None:
        """See Fleet."""
        self.released.append(bundle.name)


def settled(fleet: Machines, **keys: Any) -> tuple[Deployment, list[str]]:
    """A deployment with an attention replica and as many shards as ``fleet`` has room for, and the events' texts."""
    events = EventLog()
    made = Deployment(load_config(None, keys), fleet, Roster(fleet, events, lambda member: None), events)
    requests = [made.request("attention", made.config.attention, 2)]
    requests += [made.request("expert", made.config.experts) for _ in fleet.order[1:]]
    bundles = made.reserve(requests, 1.0)
    made.settle_wires([bundle.node_id for bundle in bundles])
    told = events.latest(9)
    assert [event.kind for event in told] == [ClusterEventKind.CLUSTER_EVENT_KIND_WIRES_CHOSEN]
    fleet.close()
    return made, [event.message for event in told]


def test_auto_takes_nccl_where_every_node_has_it() -> None:
    made, told = settled(fleet := Machines("112"), **CUDA)
    assert made.wires.nccl
    assert told == [
        "wires: auto: nccl between routers and expert shards; else shm on one node, tcp between nodes",
    ]
    assert fleet.asked[-1] == ("requirements_missing", ("1", "2"))
    assert made.settings([], 0.0).nccl


def test_auto_says_which_node_keeps_it_from_nccl() -> None:
    made, told = settled(Machines("112", {"2": [NO_CUPY, "old NCCL"], "3": ["of no account"]}), **CUDA)
    assert not made.wires.nccl
    text = f"auto: shm on one node, tcp between nodes; not nccl: node 10.0.0.2: {NO_CUPY}; old NCCL"
    assert told == [f"wires: {text}"]
    assert made.wires.rule == text
    assert not made.settings([], 0.0).nccl


def test_a_node_that_comes_later_must_have_what_was_taken() -> None:
    fleet = Machines("11", {"3": [NO_CUPY]})
    made, _ = settled(fleet, **CUDA)
    fleet.order = ["1", "3"]
    with pytest.raises(ConfigError, match=r"^nccl, which transport: auto has taken, cannot be used: node 10\.0\.0\.3"):
        made.reserve([made.request("expert", made.config.experts) for _ in range(2)], 1.0)
    assert fleet.released == ["expert-1", "expert-2"]
    assert fleet.asked[-1] == ("requirements_missing", ("3",))


def test_a_node_that_comes_later_may_lack_what_was_not_taken() -> None:
    fleet = Machines("12", {"2": [NO_CUPY], "3": [NO_CUPY]})
    made, _ = settled(fleet, **CUDA)
    fleet.order = ["3"]
    made.reserve([made.request("expert", made.config.experts)], 1.0)
    assert fleet.asked[-1] == ("cuda_missing", ("3",))


def test_forced_shared_memory_gives_its_bundles_back() -> None:
    fleet = Machines("12")
    with pytest.raises(ConfigError, match="router-0 is on node 1 and expert-0 on node 2"):
        settled(fleet, transport="shm")
    assert fleet.released == ["attention-0", "expert-0"]
    fleet.close()


def test_each_node_is_asked_for_its_certificates_once_and_the_controllers_too() -> None:
    fleet = Machines("23")
    made, _ = settled(fleet, **TLS)
    assert fleet.asked == [("wire_tls_problem", ("2", "3")), ("wire_tls_problem", ("1",))]
    fleet.order, fleet.problems = ["3", "1"], {"1": "found after it was asked"}
    made.reserve([made.request("expert", made.config.experts) for _ in range(2)], 1.0)
    assert len(fleet.asked) == 2


@pytest.mark.parametrize("bad", ["1", "2"])
def test_a_node_without_its_certificates_is_refused_with_what_is_wrong(bad: str) -> None:
    fleet = Machines("22")
    fleet.problems = {bad: "data_plane.tls.ca: /ca.pem: cannot be read", "3": "of no account"}
    with pytest.raises(ConfigError, match=rf"^node 10\.0\.0\.{bad}: data_plane\.tls\.ca: /ca\.pem: cannot be read$"):
        settled(fleet, **TLS)
    assert fleet.released == (["attention-0", "expert-0"] if bad == "2" else [])
    fleet.close()


def test_without_tls_or_without_wires_nobody_is_asked() -> None:
    for keys in ({}, {"transport": "local", **TLS}):
        fleet = Machines("12")
        settled(fleet, **keys)
        assert fleet.asked == []
