"""One Ray cluster for the whole session: a head and one node for each fleet, all on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from expertmesh.v1 import control_pb2
from ray.util import list_named_actors, placement_group_table

from cluster.config import ServerConfig, load_config
from cluster.ray_fleet import GROUP_PREFIX, NAMESPACE
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, Reference, greedy, tiny_model

COUNT = 32
PROMPTS = [random_ids(length, seed=length, vocab=VOCABULARY) for length in (2, 9, 33, 70)]
ROLE = "expertmesh.io/role"


SMALL = {"num_cpus": 4, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A cluster with nodes labelled attention and experts, and a head without a label."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=SMALL)
    try:
        cluster.add_node(**SMALL, labels={ROLE: "attention"})
        cluster.add_node(**SMALL, labels={ROLE: "experts"})
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="session")
def ray_address(ray_cluster: Any) -> str:
    """Its address."""
    return str(ray_cluster.address)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random deepseek_v3 checkpoint and the Hugging Face model that wrote it."""
    path = tmp_path_factory.mktemp("deepseek")
    return path, tiny_model(path, seed=5)


@pytest.fixture(scope="session")
def wanted(deepseek: tuple[Path, Any]) -> list[Reference]:
    """What transformers generates for PROMPTS."""
    return [greedy(deepseek[1], prompt, COUNT) for prompt in PROMPTS]


def agreement(client: Client, wanted: list[Reference]) -> list[bool]:
    """For each of PROMPTS, served together: are the tokens those of transformers?"""
    return [w.agrees(got) for w, got in zip(wanted, client.tokens_together(PROMPTS, COUNT), strict=True)]


def kv_in_use(client: Client) -> int:
    """KV blocks that are not free, over all attention shards."""
    return sum(a.attention.kv_blocks - a.attention.kv_blocks_free for a in client.load(control_pb2.ROLE_ATTENTION))


def distributed(address: str, path: Path, **overrides: Any) -> ServerConfig:
    """A configuration for the session's cluster: everything on one node unless told otherwise."""
    keys = {
        "model": str(path),
        "ray.address": address,
        "gateway.port": 0,
        "gateway.http_port": 0,
        "attention.threads": 1,
        "experts.threads": 1,
        "experts.shards": 2,
        "attention.kv_memory": "8MiB",
        "attention.node_labels": {ROLE: "experts"},
        "experts.node_labels": {ROLE: "experts"},
    }
    return load_config(None, {**keys, **overrides})


def server_file(folder: Path, address: str, model: Path, **sections: Any) -> Path:
    """A configuration file for ``expertmesh serve`` in the session's cluster: a node for each fleet."""
    tree = {
        "model": str(model),
        "ray": {"address": address},
        "attention": {"threads": 1, "kv_memory": "8MiB", "node_labels": {ROLE: "attention"}},
        "experts": {"threads": 1, "shards": 2, "node_labels": {ROLE: "experts"}},
        **sections,
    }
    file = folder / "server.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def nothing_of_ours(address: str) -> bool:
    """True if the Ray cluster has neither an actor nor a placement group of expertmesh."""
    ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    try:
        actors = [entry for entry in list_named_actors(all_namespaces=True) if entry["namespace"] == NAMESPACE]
        groups = [group for group in placement_group_table().values() if group["name"].startswith(GROUP_PREFIX)]
        return not actors and all(group["state"] == "REMOVED" for group in groups)
    finally:
        ray.shutdown()


def rings_mapped() -> int:
    """Processes of this machine that hold a shared-memory ring (a memfd: it has no name anywhere else)."""
    count = 0
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            count += "memfd:expertmesh" in maps.read_text()
    return count
