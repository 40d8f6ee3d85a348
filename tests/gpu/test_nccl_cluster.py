"""A cluster over Ray whose rows travel over NCCL: one GPU for the attention replica, one for each expert shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expertmesh.v1 import control_pb2 as pb

from cluster.config import load_config
from cluster.launch import running_cluster
from tests.chorus import singing
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, greedy

COUNT = 24
PROMPTS = [random_ids(3 + 2 * n, seed=n, vocab=VOCABULARY) for n in range(6)]


def need(devices: int) -> None:
    if torch.cuda.device_count() < devices:
        pytest.skip(f"{devices} CUDA devices are needed, one a bundle; torch sees {torch.cuda.device_count()}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("shards", "later"), [(1, 1), (2, 3)])
def test_the_tokens_are_those_of_the_reference(checkpoint: tuple[Path, Any], shards: int, later: int) -> None:
    need(1 + later)
    path, model = checkpoint
    keys = {
        "gateway.port": 0,
        "gateway.http_port": 0,
        "attention.kv_memory": "4MiB",
        "experts.shards": shards,
        "ray.address": "local",
    }
    config = load_config(None, {"model": str(path), "transport": "nccl", "device": "cuda", **keys})
    wanted = [greedy(model, prompt, COUNT) for prompt in PROMPTS]
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        with singing(client, PROMPTS, wanted) as chorus:
            client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=later))
            chorus.after(24)
        view = client.cluster()
        media = {wire.medium for wire in view.wires if wire.to.startswith("expert")}
        assert media == {"nccl"}
