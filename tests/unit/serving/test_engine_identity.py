"""Greedy tokens are the same however the engine works: alone or among others, whatever is cached, cut, put off, split.

A random deepseek_v3 checkpoint in fp32; the reference is transformers. Each case also shows that what it is about
happened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from expertmesh.v1 import control_pb2
from expertmesh.v1 import inference_pb2 as pb

from cluster.config import ServerConfig
from cluster.launch import running_cluster
from tests.paged_runner import random_ids
from tests.serving import Client, Reference, greedy, ids_request

Local = Callable[..., ServerConfig]
SHARED = random_ids(70, seed=100, vocab=290)
"""Begins half of the prompts."""

PROMPTS = [
    (SHARED if n % 2 else []) + random_ids(count, seed=n, vocab=290)
    for n, count in enumerate([1, 3, 9, 17, 30, 41, 66, 2, 25, 50, 5, 12, 90, 7, 33, 21] * 2)
]
TOKENS = 12
SMALL = {"attention.token_budget": 16, "attention.max_running": 8, "attention.block_size": 4}

CASES = {
    "as it comes": {},
    "small chunks": {**SMALL, "attention.max_gap": 1.5},
    "no prefix cache": {"attention.prefix_cache": False, **SMALL},
    "too few blocks": {"attention.kv_memory": "120KiB", "context_length": 200, **SMALL, "attention.max_running": 6},
    "micro-batches": {"attention.micro_batches": 3},
    "micro-batches of small chunks": {**SMALL, "attention.micro_batches": 4},
    "one shard": {"experts.shards": 1},
    "three shards": {"experts.shards": 3},
    "all of it": {
        **SMALL,
        "attention.kv_memory": "120KiB",
        "context_length": 200,
        "attention.micro_batches": 2,
        "experts.shards": 3,
    },
}


@pytest.fixture(scope="module")
def wanted(checkpoint: tuple[Path, Any]) -> list[Reference]:
    return [greedy(checkpoint[1], prompt, TOKENS) for prompt in PROMPTS]


def attention(client: Client) -> control_pb2.AttentionLoad:
    (actor,) = client.load(control_pb2.ROLE_ATTENTION)
    return actor.attention


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers(
    checkpoint: tuple[Path, Any], local: Local, wanted: list[Reference], name: str, deterministic: bool
) -> None:
    config = local(checkpoint[0], deterministic=deterministic, **CASES[name])
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        together = client.tokens_together(PROMPTS, TOKENS)
        again = [client.tokens(PROMPTS[n], TOKENS) for n in (5, 12)]
        load = attention(client)
    assert [w.agrees(g) for w, g in zip(wanted, together, strict=True)] == [True] * len(PROMPTS)
    assert [wanted[n].agrees(g) for n, g in zip((5, 12), again, strict=True)] == [True, True]
    assert load.kv_blocks_free == load.kv_blocks
    assert (load.prefix_hit_tokens > 0) == ("prefix_cache" not in str(CASES[name]))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_requests_that_outgrow_the_cache_are_put_off(
    checkpoint: tuple[Path, Any], local: Local, micro_batches: int
) -> None:
    """64 blocks of 4: all four start with 5 blocks each, and want 30 in the end."""
    prompts = [random_ids(20, seed=60 + n, vocab=290) for n in range(4)]
    small = {"attention.kv_memory": "120KiB", "context_length": 200, "attention.block_size": 4}
    config = local(checkpoint[0], **small, **{"attention.micro_batches": micro_batches})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        together = client.tokens_together(prompts, 100)
        load = attention(client)
    assert [greedy(checkpoint[1], p, 100).agrees(g) for p, g in zip(prompts, together, strict=True)] == [True] * 4
    assert load.preemptions > 0
    assert load.kv_blocks_free == load.kv_blocks == 64


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_answers_of_one_request_share_its_prompt(
    family: str, checkpoint: tuple[Path, Any], local: Local, tmp_path: Path
) -> None:
    """Sixteen answers: each is what a request with its seed and choice gives alone, and the prompt is computed once."""
    from tests.serving import tiny_model

    path = checkpoint[0]
    if family != "deepseek_v3":
        path = tmp_path
        tiny_model(path, family, seed=1)
    prompt = random_ids(101, seed=9, vocab=290)
    request = ids_request(prompt, 10, n=16)
    request.sampling.CopyFrom(pb.SamplingParameters(temperature=1.3, seed=5))
    with running_cluster(local(path, **{"attention.prefix_cache": False})) as doors, Client(doors.grpc) as client:
        before = attention(client).tokens
        choices: dict[int, list[int]] = {n: [] for n in range(16)}
        for message in client.inference.Generate(request, timeout=60):
            choices[message.choice] += message.token_ids
        load = attention(client)
        again = client.inference.Generate(request, timeout=60)
        repeated: dict[int, list[int]] = {n: [] for n in range(16)}
        for message in again:
            repeated[message.choice] += message.token_ids
        request.n = 1
        first = client.generate(request).tokens
    assert all(len(tokens) == 10 for tokens in choices.values())
    assert len({tuple(tokens) for tokens in choices.values()}) > 8
    assert repeated == choices
    assert first == choices[0]
    assert load.tokens - before == 160
    assert load.kv_blocks_free == load.kv_blocks


def test_a_repeated_system_prompt_is_computed_once(checkpoint: tuple[Path, Any], local: Local) -> None:
    """Ten requests at the same time, and one later."""
    system = random_ids(320, seed=3, vocab=290)
    prompts = [system + random_ids(5, seed=50 + n, vocab=290) for n in range(10)]
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        client.tokens_together(prompts, 4)
        together = attention(client)
        late = client.generate(ids_request([*system, 7, 8, 9], 4))
    assert together.prefix_hit_tokens == 9 * 320
    assert together.prefix_queried_tokens == 10 * 325
    assert late.messages[0].started.cached_tokens == 320
    assert late.finished.usage.cached_tokens == 320
