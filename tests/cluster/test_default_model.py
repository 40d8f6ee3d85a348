"""The default model through the whole system: the answers of the dense original."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expertmesh.v1 import inference_pb2 as pb

from cluster.config import load_config
from cluster.launch import running_cluster
from tests.cluster.conftest import ROLE
from tests.dense_reference import dense_reference
from tests.prompts import PROMPTS
from tests.serving import Client, Reference, greedy_along

COUNT = 64


@pytest.fixture(scope="module")
def client(ray_address: str) -> Iterator[Client]:
    keys = {
        "ray.address": ray_address,
        "gateway.port": 0,
        "gateway.http_port": 0,
        "attention.node_labels": {ROLE: "experts"},
        "experts.node_labels": {ROLE: "experts"},
    }
    with running_cluster(load_config(None, keys)) as doors, Client(doors.grpc) as client:
        yield client


def chat(text: str) -> pb.GenerateRequest:
    stopping = pb.StoppingParameters(max_tokens=COUNT, ignore_eos=True)
    request = pb.GenerateRequest(sampling=pb.SamplingParameters(temperature=0), stopping=stopping)
    request.messages.messages.add(role="user", content=text)
    return request


def dense(text: str, got: list[int]) -> Reference:
    model, tokenizer = dense_reference()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return greedy_along(model, ids if isinstance(ids, list) else ids["input_ids"], got)


@pytest.mark.timeout(600)
def test_twenty_prompts_continue_as_the_dense_original_does(client: Client) -> None:
    """64 greedy tokens each, past the end of the answer too; all twenty share the running batch."""
    torch.set_num_threads(2)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        got = list(pool.map(lambda text: client.generate(chat(text), timeout=500), PROMPTS))
    assert len({len(text.split()) for text in PROMPTS}) > 10
    wanted = [dense(text, answer.tokens) for text, answer in zip(PROMPTS, got, strict=True)]
    assert all(len(answer.tokens) == COUNT for answer in got)
    assert [w.agrees(g.tokens) for w, g in zip(wanted, got, strict=True)] == [True] * 20
    assert sum(w.clear for w in wanted) > 0.9 * 20 * COUNT


def test_the_capital_of_france(client: Client) -> None:
    request = chat("What is the capital of France?")
    request.stopping.ignore_eos = False
    answer = client.generate(request)
    assert answer.text == "The capital of France is Paris."
    assert answer.finished.reason == pb.FINISH_REASON_STOP
