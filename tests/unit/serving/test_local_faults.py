"""What fails inside a cluster: each request ends with its tokens or a typed error, and what is sound goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors.attention import AttentionShard
from actors.model import kv_cache
from actors.model.experts import ExpertBank
from actors.refusals import NoMemory
from actors.router import Router
from cluster.config import ServerConfig
from cluster.controller import StartFailed
from cluster.gateway import peers
from cluster.launch import running_cluster
from tests.serving import Client, greedy, ids_request
from tests.unit.serving.conftest import Actors
from tests.waiting import until

Local = Callable[..., ServerConfig]
PROMPT = [7, 11, 13]


def code_of(client: Client, count: int = 8) -> grpc.StatusCode:
    """How a small request ends."""
    try:
        client.tokens(PROMPT, count)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def health_of(client: Client) -> int:
    request = health_pb2.HealthCheckRequest(service="expertmesh.v1.Inference")
    return health_pb2_grpc.HealthStub(client.channel).Check(request).status


def test_an_answer_that_comes_too_late_hurts_its_step_alone(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert shard hangs for longer than a step may take, and answers after the step was given up."""
    release, hang, honest = threading.Event(), threading.Event(), ExpertBank.forward
    monkeypatch.setattr(peers, "_SUSPECT_S", 3600.0)

    def forward(*args: Any) -> torch.Tensor:
        if hang.is_set():
            release.wait(30)
        return honest(*args)

    monkeypatch.setattr(ExpertBank, "forward", forward)
    config = local(checkpoint[0], step_timeout_s=0.5, recovery_timeout_s=1.0)
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        wanted = greedy(checkpoint[1], PROMPT, 8)
        assert wanted.agrees(client.tokens(PROMPT, 8))
        hang.set()
        assert code_of(client) == grpc.StatusCode.UNAVAILABLE
        assert health_of(client) == health_pb2.HealthCheckResponse.NOT_SERVING
        hang.clear()
        release.set()
        until(lambda: code_of(client) == grpc.StatusCode.OK)
        assert wanted.agrees(client.tokens(PROMPT, 8))
        until(lambda: health_of(client) == health_pb2.HealthCheckResponse.SERVING)


def test_a_replica_without_its_router_gets_no_requests(
    checkpoint: tuple[Path, Any], local: Local, actors: Actors
) -> None:
    """Those that it has go on elsewhere."""
    config = local(checkpoint[0], **{"attention.replicas": 2})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        held = [client.inference.Generate(ids_request(PROMPT, 480)) for _ in range(2)]
        for call in held:
            next(call)
        actors.of(Router)[0].stop()
        wanted = client.tokens(PROMPT, 480)
        assert [[token for message in call for token in message.token_ids] for call in held] == [wanted, wanted]
        assert [code_of(client) for _ in range(6)] == [grpc.StatusCode.OK] * 6
        assert health_of(client) == health_pb2.HealthCheckResponse.SERVING


def test_without_any_router_health_says_so(
    checkpoint: tuple[Path, Any], local: Local, actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_cluster(local(checkpoint[0], recovery_timeout_s=0.5)) as doors, Client(doors.grpc) as client:
        assert health_of(client) == health_pb2.HealthCheckResponse.SERVING
        held = client.inference.Generate(ids_request(PROMPT, 480))
        next(held)
        honest = Router.load
        monkeypatch.setattr(Router, "load", lambda _: 1 / 0)  # no successor can start
        actors.of(Router)[0].stop()
        until(lambda: health_of(client) == health_pb2.HealthCheckResponse.NOT_SERVING)
        assert code_of(client) == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as caught:
            list(held)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        monkeypatch.setattr(Router, "load", honest)
        until(lambda: health_of(client) == health_pb2.HealthCheckResponse.SERVING)
        assert code_of(client) == grpc.StatusCode.OK


def test_results_of_the_wrong_shape_are_an_error_not_wrong_tokens(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ExpertBank.forward
    monkeypatch.setattr(ExpertBank, "forward", lambda *args: honest(*args)[:1])
    with (
        running_cluster(local(checkpoint[0], step_timeout_s=0.5, recovery_timeout_s=0.5)) as doors,
        Client(doors.grpc) as client,
    ):
        assert code_of(client) == grpc.StatusCode.UNAVAILABLE


def test_an_error_in_the_engine_ends_the_step_alone(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    import actors.step_runner

    broken, honest = threading.Event(), actors.step_runner.sample_chunks

    def sample_chunks(*args: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("a bug")
        return honest(*args)

    monkeypatch.setattr(actors.step_runner, "sample_chunks", sample_chunks)
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        broken.set()
        with pytest.raises(grpc.RpcError) as caught:
            client.tokens(PROMPT, 8)
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert "a bug" not in caught.value.details()
        broken.clear()
        assert code_of(client) == grpc.StatusCode.OK


def test_logits_that_are_not_finite_end_their_request_alone(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two requests of a batch gets a NaN; the other's tokens are as ever."""
    import actors.step_runner

    honest = actors.step_runner.sample_chunks

    def sample_chunks(chunks: Any, logits: torch.Tensor) -> Any:
        poisoned = logits.clone()
        for row, chunk in enumerate(chunks):
            if chunk.draw.sampling.top_k == 1:
                poisoned[row, 5] = float("nan")
        return honest(chunks, poisoned)

    monkeypatch.setattr(actors.step_runner, "sample_chunks", sample_chunks)
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        sound = client.inference.Generate(ids_request(PROMPT, 100))
        next(sound)
        marked = ids_request(PROMPT, 8)
        marked.sampling.top_k = 1
        with pytest.raises(grpc.RpcError) as caught:
            client.generate(marked)
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert sum(len(message.token_ids) for message in sound) == 100


def test_a_start_that_takes_too_long_says_where_it_was(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, honest = threading.Event(), AttentionShard.stop

    def stop(shard: AttentionShard) -> None:
        stopped.set()
        honest(shard)

    monkeypatch.setattr(AttentionShard, "load", lambda _: stopped.wait(30))
    monkeypatch.setattr(AttentionShard, "stop", stop)
    with (
        pytest.raises(StartFailed, match=r"not up within start_timeout_s \(0.5 s\); last: reading weights"),
        running_cluster(local(checkpoint[0], start_timeout_s=0.5)),
    ):
        pass


def test_more_kv_memory_than_there_is(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(kv_cache, "_zeros", refuse)
    with (
        pytest.raises(NoMemory, match=r"attention\.kv_memory: 4194304 bytes cannot be allocated: Unable to allocate"),
        running_cluster(local(checkpoint[0])),
    ):
        pass
