"""Clusters of other shapes than the plain one: over two nodes, with a dead shard, without room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from expertmesh.v1 import control_pb2

from actors.model.errors import CheckpointError
from cluster.config import load_config
from cluster.launch import running_cluster
from placement.bundles import NoRoom
from tests.cluster.conftest import (
    COUNT,
    PROMPTS,
    ROLE,
    agreement,
    distributed,
    nothing_of_ours,
)
from tests.serving import Client, Reference, drop_tensor, greedy, tiny_model

SHM = Path("/dev/shm")


def test_one_process_gives_the_same(deepseek: tuple[Path, Any], wanted: list[Reference]) -> None:
    keys = {
        "model": str(deepseek[0]),
        "transport": "local",
        "gateway.port": 0,
        "gateway.http_port": 0,
        "attention.kv_memory": "8MiB",
    }
    with running_cluster(load_config(None, keys)) as doors, Client(doors.grpc) as client:
        assert all(agreement(client, wanted))


def test_two_nodes_use_tcp(ray_address: str, deepseek: tuple[Path, Any], wanted: list[Reference]) -> None:
    """Attention and router on one node, the expert shards on the other; the gateway on a third, the head."""
    config = distributed(ray_address, deepseek[0], **{"attention.node_labels": {ROLE: "attention"}})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        assert all(agreement(client, wanted))
        view = client.cluster()
    where = {actor.name: actor.node_id for actor in view.actors}
    assert where["attention-0"] == where["router-0"] != where["expert-0"] == where["expert-1"]
    media = {(getattr(wire, "from"), wire.to): wire for wire in view.wires}
    for shard in ("expert-0", "expert-1"):
        wire = media["router-0", shard]
        # every row of 64 floats goes out to at least one shard and comes back at least once, in both MoE layers
        assert wire.medium == "tcp"
        assert min(wire.bytes_sent, wire.bytes_received) > 64 * 4 * sum(map(len, PROMPTS))
    assert media["attention-0", "router-0"].medium == "shm"
    assert media["attention-0", "gateway-0"].medium == "tcp"


def test_shards_spread_over_the_nodes_there_are(ray_address: str, deepseek: tuple[Path, Any]) -> None:
    keys = {"experts.shards": 3, "experts.node_labels": {}, "attention.replicas": 2, "attention.node_labels": {}}
    with running_cluster(distributed(ray_address, deepseek[0], **keys)) as doors, Client(doors.grpc) as client:
        view = client.cluster()
        for role in (control_pb2.ROLE_EXPERT, control_pb2.ROLE_ATTENTION):
            shards = [actor for actor in view.actors if actor.role == role]
            assert len({actor.node_id for actor in shards}) == len(shards)
        assert len(client.tokens(PROMPTS[0], 4)) == 4


def test_glm4_moe_over_two_shards(ray_address: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "glm4_moe", seed=9)
    with running_cluster(distributed(ray_address, tmp_path)) as doors, Client(doors.grpc) as client:
        got = client.tokens_together(PROMPTS, COUNT)
    assert all(greedy(model, p, COUNT).agrees(g) for p, g in zip(PROMPTS, got, strict=True))


def test_no_room_says_what_was_wanted(ray_address: str, deepseek: tuple[Path, Any]) -> None:
    keys = {"experts.node_labels": {ROLE: "nowhere"}, "start_timeout_s": 1.5}
    with (
        pytest.raises(NoRoom, match=r"bundle expert-0: no node with 0.25 CPU and labels .*nowhere.*nodes: .*CPU free"),
        running_cluster(distributed(ray_address, deepseek[0], **keys)),
    ):
        pass
    assert nothing_of_ours(ray_address)


def test_a_missing_tensor_ends_the_start_with_its_name(
    ray_address: str, deepseek: tuple[Path, Any], tmp_path: Path
) -> None:
    """Only the expert shard that owns it notices; everything that had been started is gone again."""
    drop_tensor(deepseek[0], tmp_path, "model.layers.2.mlp.experts.7.up_proj.weight")
    with (
        pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight"),
        running_cluster(distributed(ray_address, tmp_path)),
    ):
        pass
    assert nothing_of_ours(ray_address)
