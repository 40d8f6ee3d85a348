"""With how many expert shards a cluster starts, and which numbers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.model.families import load_spec
from cluster.config import ConfigError, load_config
from cluster.local_fleet import LocalFleet
from cluster.shard_counts import check_shards, first_count
from placement.spec import Node
from tests.checkpoints import write_deepseek_v3

EXPERTS = {"role": "experts"}
NODES = [
    Node("head", "10.0.0.1", 2.0),
    Node("a", "10.0.0.2", 4.0, EXPERTS, gpus_free=2.0, gpus=2.0),
    Node("b", "10.0.0.3", 4.0, EXPERTS, gpus_free=8.0, gpus=8.0),
    Node("gone", "10.0.0.4", 4.0, EXPERTS, alive=False, gpus_free=8.0, gpus=8.0),
    Node("without CPUs", "10.0.0.5", 0.0),
    Node("busy", "10.0.0.6", 0.2, EXPERTS, gpus_free=0.5, gpus=2.0),
]


def count(**keys: Any) -> int:
    return first_count(load_config(None, keys), NODES)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"experts.shards": 5}, 5),
        ({}, 3),
        ({"experts.node_labels": EXPERTS}, 2),
        ({"experts.node_labels": {"role": "nobody"}}, 1),  # one that waits for its node
        ({"experts.node_labels": EXPERTS, "experts.min_replicas": 4}, 4),
        ({"experts.autoscale": {"mode": "on", "minimum": 5}}, 5),
        ({"experts.autoscale": {"mode": "on", "maximum": 2}}, 2),
        ({"experts.autoscale": {"mode": "dry-run", "maximum": 2}}, 3),
        ({"device": "cuda"}, 9),  # attention has one of the ten
        ({"device": "cuda", "attention.replicas": 3, "experts.gpus": 0.5}, 14),
        ({"device": "cuda", "attention.node_labels": {"role": "nobody"}}, 10),
        ({"device": "cuda", "attention.replicas": 30}, 1),
        ({"device": "cuda", "experts.gpus": 0.6}, 9),  # two do not fit on one
        ({"device": "cuda", "experts.gpus": 0.2}, 45),
    ],
)
def test_a_shard_for_each_node_or_gpu_that_may_hold_one_unless_told_otherwise(
    keys: dict[str, Any], wanted: int
) -> None:
    assert count(**keys) == wanted


def test_one_process_that_counts_no_gpus_gets_one_shard() -> None:
    (node,) = LocalFleet().nodes()
    assert first_count(load_config(None, {"device": "cuda"}), [node]) == 1


def test_what_the_model_does_not_allow_is_refused_with_where_the_number_comes_from(tmp_path: Path) -> None:
    write_deepseek_v3(tmp_path)
    spec = load_spec(tmp_path)
    most = spec.moe.n_experts
    told, by_nodes = load_config(None, {"experts.shards": most + 1}), load_config(None)
    for config, found in ((told, f"experts.shards: {most + 1};"), (by_nodes, f"{most + 1} by the number of nodes;")):
        check_shards(config, spec, most)
        with pytest.raises(ConfigError, match=f"{found} allowed are 1 to {most}: the model has"):
            check_shards(config, spec, most + 1)
