"""The endpoints of Ray's actors, made without Ray: they travel pickled, and read the files of their node."""

from __future__ import annotations

import pickle
import queue
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.transport.base import Medium, Wire
from cluster import ray_fleet
from cluster.config import ConfigError, WireTlsConfig
from cluster.hosted import RayEndpoints
from tests.authority import Authority

SECRET = b"a secret of the tests"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "node-a")
    monkeypatch.setattr(ray_fleet.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray_fleet.ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def files(folder: Path) -> WireTlsConfig:
    authority = Authority(folder)
    pair = authority.sign("node")
    return WireTlsConfig(certificate=pair.certificate, key=pair.key, ca=authority.certificate)


@pytest.mark.parametrize("network", [Medium.TCP, Medium.TLS])
def test_actors_of_one_cluster_reach_each_other(tmp_path: Path, network: Medium) -> None:
    sent = pickle.dumps(RayEndpoints(SECRET, files(tmp_path) if network is Medium.TLS else None))
    make = pickle.loads(sent)  # noqa: S301
    came: queue.Queue[Wire] = queue.Queue()
    router, shard = make("router-0", came.put), make("expert-0", came.put)
    for medium in (Medium.SHM, network):
        wire = router.connect(shard.address, time.monotonic() + 10, medium)
        accepted = came.get(timeout=10)
        assert (wire.medium, accepted.medium) == (medium, medium)
        wire.close()
        accepted.close()
    assert shard.address.host == "127.0.0.1"
    router.close()
    shard.close()


def test_files_that_went_away_since_they_were_checked_are_named(tmp_path: Path) -> None:
    tls = files(tmp_path)
    tls.ca.unlink()
    with pytest.raises(ConfigError, match=r"^data_plane\.tls\.ca: .*ca\.pem: cannot be read"):
        RayEndpoints(SECRET, tls)("router-0", lambda wire: None)
