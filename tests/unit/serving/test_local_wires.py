"""A whole cluster in this process over real wires, as if its actors were on two nodes: which pair takes which."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from expertmesh.v1 import control_pb2 as pb

from actors.transport.base import EndpointLike, Wire
from actors.transport.endpoint import Endpoint
from cluster.actor_class import ActorClass
from cluster.cli.status import print_cluster
from cluster.config import ConfigError, ServerConfig
from cluster.controller import Controller
from cluster.fleet import ActorHandle, Bundle
from cluster.local_fleet import LocalFleet, LocalHandle
from cluster.tls import wire_tls
from placement.spec import BundleRequest, Node
from tests.authority import Authority
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, greedy

HERE, THERE = "node-a", "node-b"
SECRET = b"a secret of the tests"


class TwoNodes(LocalFleet):
    """Everything here, but every second expert shard there; endpoints of processes, not of a local network."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__()
        self._tls = config.data_plane.tls
        self._turns = itertools.cycle([HERE, THERE])

    def home(self) -> str:
        """See Fleet."""
        return HERE

    def nodes(self) -> list[Node]:
        """See Fleet."""
        return [Node(node_id, "127.0.0.1", cpus_free=9.0) for node_id in (HERE, THERE)]

    def reserve(
        self, requests: Sequence[BundleRequest], timeout_s: float, without: frozenset[str] = frozenset()
    ) -> list[Bundle]:
        """See Fleet."""
        return [Bundle(r.name, next(self._turns) if r.name.startswith("expert") else HERE) for r in requests]

    def spawn(self, role: ActorClass, name: str, bundle: Bundle | None, *args: Any) -> ActorHandle:
        """See Fleet."""
        node_id = bundle.node_id if bundle else HERE

        def endpoint(own: str, on_wire: Callable[[Wire], None]) -> EndpointLike:
            tls = wire_tls(self._tls) if self._tls is not None else None
            return Endpoint(own, node_id, SECRET, on_wire=on_wire, tls=tls)

        return LocalHandle(name, role.load()(name, *args, endpoint), self.pool)


@contextmanager
def running(config: ServerConfig) -> Iterator[Client]:
    fleet = TwoNodes(config)
    controller = Controller(config, fleet)
    handle = LocalHandle("controller", controller, fleet.pool)
    try:
        with Client(handle.call("start", handle, timeout_s=60).grpc) as client:
            yield client
    finally:
        controller.stop()
        fleet.close()


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    authority = Authority(tmp_path)
    pair = authority.sign("node")
    return {"certificate": str(pair.certificate), "key": str(pair.key), "ca": str(authority.certificate)}


def media(view: pb.GetClusterResponse) -> dict[tuple[str, str], str]:
    """By (from, to); both ends of a wire say the same."""
    found = {(getattr(wire, "from"), wire.to): wire.medium for wire in view.wires}
    assert all(found.get((there, here), medium) == medium for (here, there), medium in found.items())
    return found


@pytest.mark.parametrize(
    ("transport", "encrypted", "here", "there"),
    [("auto", True, "shm", "tcp+tls"), ("auto", False, "shm", "tcp"), ("tcp", True, "tcp+tls", "tcp+tls")],
)
def test_every_pair_takes_the_wire_of_its_nodes_and_status_shows_it(
    checkpoint: tuple[Path, Any],
    local: Callable[..., ServerConfig],
    tls: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    transport: str,
    encrypted: bool,
    here: str,
    there: str,
) -> None:
    keys = {"transport": transport, **({"data_plane.tls": tls} if encrypted else {})}
    prompt, count = random_ids(12, seed=1, vocab=VOCABULARY), 16
    with running(local(checkpoint[0], **keys)) as client:
        assert greedy(checkpoint[1], prompt, count).agrees(client.tokens(prompt, count))
        view = client.cluster()
        found = media(view)
        sent = {actor.name: dict(actor.bytes_sent) for actor in view.actors}
    assert {pair: found[pair] for pair in found if pair[0] < pair[1]} == {
        ("attention-0", "gateway-0"): here,
        ("attention-0", "router-0"): here,
        ("expert-0", "router-0"): here,
        ("expert-1", "router-0"): there,
    }
    assert set(sent["router-0"]) == {here, there}
    network = "tcp+tls" if encrypted else "tcp"
    rule = {"auto": f"auto: shm on one node, {network} between nodes", "tcp": f"tcp: {network}"}[transport]
    assert view.transport == rule
    assert f"wires: {rule}" in [event.message for event in view.events]
    print_cluster(view)
    shown = capsys.readouterr().out
    assert f"transport {rule}\n" in shown
    rows = [line.split()[:3] for line in shown.splitlines()]
    for pair, medium in found.items():
        assert [*pair, medium] in rows


def test_shared_memory_between_nodes_is_refused_and_nothing_starts(
    checkpoint: tuple[Path, Any], local: Callable[..., ServerConfig]
) -> None:
    fleet = TwoNodes(config := local(checkpoint[0], transport="shm"))
    controller = Controller(config, fleet)
    text = f"^transport: shm: router-0 is on node {HERE} and expert-1 on node {THERE}, which share no memory"
    with pytest.raises(ConfigError, match=text):
        controller.start(LocalHandle("controller", controller, fleet.pool))
    assert controller._roster.all() == []
    fleet.close()
