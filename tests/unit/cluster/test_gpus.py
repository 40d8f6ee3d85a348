"""GPUs that are asked for where there are none: refused by node, before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster import gpus
from cluster.config import ConfigError, ServerConfig, load_config
from cluster.deployment import Deployment
from cluster.events import EventLog
from cluster.fleet import Bundle
from cluster.launch import _local_controller
from cluster.local_fleet import LocalFleet
from cluster.roster import Roster
from placement.spec import BundleRequest, Node
from tests.processes import run
from tests.serving import tiny_model

NCCL = {"transport": "nccl", "device": "cuda"}
NO_TORCH, NO_CUPY = "torch is a build without CUDA", "cupy is not installed"


class Machines(LocalFleet):
    """Nodes that lack things; bundles go to them in turn."""

    def __init__(self, lacking: dict[str, list[str]], gpus: dict[str, float]) -> None:
        super().__init__()
        self.lacking = lacking
        self.gpus = gpus
        self.asked: list[str] = []
        self.released: list[str] = []

    def nodes(self) -> list[Node]:
        """See Fleet."""
        return [Node(n, f"10.0.0.{n}", 4.0, {"kind": n}, True, self.gpus[n], self.gpus[n]) for n in self.lacking]

    def on_nodes(
        self, node_ids: Sequence[str], function: Callable[..., Any], *args: Any, timeout_s: float
    ) -> dict[str, Any]:
        """See Fleet."""
        self.asked += node_ids
        return {node_id: self.lacking[node_id] for node_id in node_ids}

    def reserve(
        self, requests: Sequence[BundleRequest], timeout_s: float, without: frozenset[str] = frozenset()
    ) -> list[Bundle]:
        """See Fleet."""
        able = [node.node_id for node in self.nodes() if node.gpus]
        return [Bundle(request.name, able[at % len(able)]) for at, request in enumerate(requests)]

    def release(self, bundle: Bundle) -> None:
        """See Fleet."""
        self.released.append(bundle.name)


def deployment(fleet: LocalFleet, **keys: Any) -> Deployment:
    events = EventLog()
    return Deployment(load_config(None, keys), fleet, Roster(fleet, events, lambda member: None), events)


def test_no_node_with_a_gpu() -> None:
    fleet = Machines({"1": [NO_TORCH, NO_CUPY], "2": []}, {"1": 0.0, "2": 0.0})
    made = deployment(fleet, **NCCL)
    told = (
        f"transport: nccl cannot be used: node 10.0.0.1: Ray knows of no GPU there; {NO_TORCH}; {NO_CUPY}. "
        "node 10.0.0.2: Ray knows of no GPU there"
    )
    with pytest.raises(ConfigError) as refused:
        made.reserve([made.request("expert", made.config.experts)], 1.0)
    assert str(refused.value) == told
    fleet.close()


def test_nodes_that_lack_what_their_bundles_need_and_only_those() -> None:
    fleet = Machines({"1": [], "2": [NO_CUPY], "3": [NO_TORCH]}, {"1": 2.0, "2": 2.0, "3": 0.0})
    made = deployment(fleet, **NCCL)
    made.reserve([made.request("expert", made.config.experts)], 1.0)
    assert fleet.asked == ["1"]
    with pytest.raises(ConfigError, match=rf"^transport: nccl cannot be used: node 10\.0\.0\.2: {NO_CUPY}$"):
        made.reserve([made.request("expert", made.config.experts) for _ in range(2)], 1.0)
    assert fleet.asked == ["1", "2"]  # each node once
    assert fleet.released == ["expert-1", "expert-2"]
    fleet.close()


def test_a_fleet_whose_own_nodes_have_none() -> None:
    fleet = Machines({"1": [], "2": []}, {"1": 1.0, "2": 0.0})
    made = deployment(fleet, device="cuda", **{"attention.node_labels": {"kind": "2"}})
    with pytest.raises(ConfigError, match=r"^device: cuda cannot be used: node 10\.0\.0\.2: Ray knows of no GPU"):
        made.reserve([made.request("attention", made.config.attention, 2)], 1.0)
    fleet.close()


def test_without_gpus_nobody_is_asked() -> None:
    fleet = Machines({"1": [NO_TORCH]}, {"1": 1.0})
    made = deployment(fleet)
    request = made.request("attention", made.config.attention, 2)
    assert (request.gpus, request.actors) == (0.0, 2)
    made.reserve([request], 1.0)
    assert fleet.asked == []
    fleet.close()


def test_bundles_ask_for_what_is_configured() -> None:
    fleet = Machines({"1": []}, {"1": 1.0})
    made = deployment(fleet, device="cuda", **{"attention.gpus": 0.5})
    assert made.request("attention", made.config.attention, 2).gpus == 0.5
    assert made.request("expert", made.config.experts).gpus == 1.0
    fleet.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(path)
    return path


def test_a_start_that_is_refused_starts_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "requirements_missing", lambda: [NO_TORCH, NO_CUPY])
    config: ServerConfig = load_config(None, {"model": str(model), "gateway.port": 0, "gateway.http_port": 0, **NCCL})
    with _local_controller(config) as handle:
        with pytest.raises(ConfigError, match=f"node 127.0.0.1: {NO_TORCH}; {NO_CUPY}"):
            handle.call("start", handle, timeout_s=30)
        assert handle.actor._roster.all() == []  # type: ignore[attr-defined]


def test_serve_says_so_in_one_line(model: Path, tmp_path: Path) -> None:
    """In one process, so that Ray need not start; this machine has no CUDA build of torch, or no device."""
    if not gpus.cuda_missing():
        pytest.skip("this machine has a GPU: nothing is refused")
    file = tmp_path / "server.yaml"
    file.write_text("{transport: local, device: cuda}")
    result = run(
        "serve", "--model", str(model), "--grpc-port", "0", "--http-port", "0", "--config", str(file), timeout_s=60
    )
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: device: cuda cannot be used: node 127.0.0.1: torch ")
