"""The next step is under way before the last one's tokens are told, and no token is another one for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
import torch
from expertmesh.v1 import control_pb2

import actors.logprob_book
from actors.attention import AttentionShard
from actors.moe_client import MoEClient
from actors.span_log import Recording
from cluster.config import ServerConfig
from cluster.launch import running_cluster
from tests.paged_runner import random_ids
from tests.serving import Client, greedy, ids_request
from tests.waiting import until

Local = Callable[..., ServerConfig]
PROMPT = [11, 7, 5, 3]


def test_tokens_are_told_while_experts_compute_the_next_step(
    checkpoint: tuple[Path, Any], local: Local, actors: Any
) -> None:
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        (shard,) = actors.of(AttentionShard)
        shard.start_spans()
        tokens = client.tokens(PROMPT, 20)
        recording = shard.take_spans()
    assert greedy(checkpoint[1], PROMPT, 20).agrees(tokens)
    sent, told, drawn = (_begins(recording, name) for name in ("rows out", "publish", "sample"))
    assert len(drawn) == len(told) == 20
    layers = len(sent) // 20
    for step in range(19):
        first_sent_of_next = sent[(step + 1) * layers]
        assert drawn[step] < first_sent_of_next < told[step], f"step {step}"
        assert told[step] < drawn[step + 1]
    assert told[19] > drawn[19]  # nothing follows the last one: it is told at once


def test_tokens_do_not_wait_for_a_step_whose_answers_are_there_at_once(
    checkpoint: tuple[Path, Any], local: Local, actors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the shared expert took longer than the routed ones: nothing has to be waited for."""
    honest = MoEClient.finish

    def finish(client: MoEClient, sent: object) -> Any:
        until(client.wire.ready)
        return honest(client, sent)

    monkeypatch.setattr(MoEClient, "finish", finish)
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        (shard,) = actors.of(AttentionShard)
        shard.start_spans()
        client.tokens(PROMPT, 6)
        recording = shard.take_spans()
    waits, told = (_begins(recording, name) for name in ("wait for experts", "publish"))
    layers = len(waits) // 6
    for step in range(5):
        assert told[step] < waits[(step + 1) * layers], f"step {step}"


@pytest.mark.parametrize("tokens", [1, 8])
def test_log_probabilities_that_fail_end_their_request_alone(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(actors.logprob_book, "token_logprobs", Mock(side_effect=MemoryError("too much")))
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        sound = client.inference.Generate(ids_request(PROMPT, 60))
        next(sound)
        with pytest.raises(grpc.RpcError) as caught:
            client.generate(ids_request(PROMPT, tokens, logprobs=2), timeout=30)
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert sum(len(message.token_ids) for message in sound) == 60
        (actor,) = client.load(control_pb2.ROLE_ATTENTION)
        assert actor.attention.kv_blocks_free == actor.attention.kv_blocks


def test_log_probabilities_over_the_wire(checkpoint: tuple[Path, Any], local: Local) -> None:
    """Of the answer and of the prompt, beside another request, against transformers'."""
    prompt = random_ids(90, seed=4, vocab=290)
    request = ids_request(prompt, 5, logprobs=3, prompt_logprobs=2)
    config = local(checkpoint[0], **{"attention.token_budget": 32, "attention.max_running": 8})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        other = client.inference.Generate(ids_request(PROMPT, 100))
        next(other)
        result = client.generate(request)
        other.cancel()
        again = client.generate(request)
    whole = torch.tensor([[*prompt, *result.tokens]])
    with torch.inference_mode():
        logits = checkpoint[1](input_ids=whole).logits[0].double()
    expected = torch.log_softmax(logits, dim=-1)
    for got in (result, again):
        told = [entry for message in got.messages for entry in message.logprobs]
        (started,) = (message.started for message in got.messages if message.HasField("started"))
        assert [entry.token_id for entry in told] == result.tokens
        assert [entry.token_id for entry in started.prompt_logprobs] == prompt[1:]
        for row, entry in enumerate([*started.prompt_logprobs, *told]):
            assert entry.logprob == pytest.approx(float(expected[row, entry.token_id]), abs=1e-4)
            assert entry.rank == 1 + int((expected[row] > expected[row, entry.token_id]).sum())
            assert len(entry.top) == (2 if row < len(prompt) - 1 else 3)
            best = expected[row].topk(len(entry.top))
            assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert again.finished.usage.cached_tokens == 0  # the prompt's rows are needed


def _begins(recording: Recording, name: str) -> list[int]:
    return sorted(span.start_ns for span in recording.spans if span.name == name)
