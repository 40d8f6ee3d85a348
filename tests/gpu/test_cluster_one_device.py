"""A whole cluster that computes on one GPU: all roles in this process, which share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from expertmesh.v1 import control_pb2 as pb

from cluster.config import load_config
from cluster.launch import running_cluster
from tests.chorus import singing
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, greedy

COUNT = 24
PROMPTS = [random_ids(3 + 2 * n, seed=n, vocab=VOCABULARY) for n in range(6)]


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_tokens_are_those_of_the_reference(checkpoint: tuple[Path, Any], deterministic: bool) -> None:
    """Alone, together, and while the experts move."""
    path, model = checkpoint
    keys = {"gateway.port": 0, "gateway.http_port": 0, "attention.kv_memory": "4MiB", "deterministic": deterministic}
    config = load_config(None, {"model": str(path), "transport": "local", "device": "cuda", **keys})
    wanted = [greedy(model, prompt, COUNT) for prompt in PROMPTS]
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        assert wanted[0].agrees(client.tokens(PROMPTS[0], COUNT))
        with singing(client, PROMPTS, wanted) as chorus:
            client.control.ScaleExperts(pb.ScaleExpertsRequest(shards=3))
            chorus.after(24)
        busy = [actor.expert.busy_s for actor in client.load(pb.ROLE_EXPERT)]
        assert sum(seconds > 0 for seconds in busy) >= 2
