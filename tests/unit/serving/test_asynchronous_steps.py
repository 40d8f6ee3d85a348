"""The next step is under way before the last one's tokens are told, and no token is another one for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.attention import AttentionShard
from actors.span_log import Recording
from cluster.config import ServerConfig
from cluster.launch import running_cluster
from tests.serving import Client, greedy

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


def _begins(recording: Recording, name: str) -> list[int]:
    return sorted(span.start_ns for span in recording.spans if span.name == name)
