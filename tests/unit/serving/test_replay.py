"""Streams on real engines that lose or leave their attention shard: the same tokens, nothing lost, nothing twice."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from expertmesh.v1 import inference_pb2 as pb

from actors.attention import AttentionShard
from actors.attention_engine import AttentionEngine
from actors.engine.request import GenerationRequest, SamplingParams
from actors.frames import Kind
from actors.refusals import Refusal
from actors.router import Router
from actors.token_frames import decode_tokens
from actors.transport.base import Medium
from cluster.config import ServerConfig
from cluster.gateway.peers import AttentionPeer, OnlyShard
from cluster.gateway.server import Gateway
from cluster.launch import running_cluster
from cluster.local_fleet import LocalHandle
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, greedy, ids_request
from tests.unit.serving.conftest import Actors
from tests.waiting import until

Local = Callable[..., ServerConfig]
PROMPTS = [random_ids(length, seed=length, vocab=VOCABULARY) for length in (1, 3, 5, 17, 24, 33, 40, 64)]
TOKENS = 120


class Gate:
    """Lets every attention shard compute so many steps more and no further, so that a test acts amid its streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._moved = threading.Condition()
        self._steps: Counter[str] = Counter()
        self._limit: int | None = None
        honest = AttentionEngine._compute

        def compute(engine: AttentionEngine, *args: Any) -> Any:
            engine._tell_untold()  # of the step before; a step that stands at the experts would have told it by now
            with self._moved:
                self._steps[engine.name] += 1
                self._moved.notify_all()
                self._moved.wait_for(lambda: self._limit is None or self._steps[engine.name] <= self._limit, 30)
            return honest(engine, *args)

        monkeypatch.setattr(AttentionEngine, "_compute", compute)

    def allow(self, steps: int | None) -> None:
        """So many steps from the last ``reset`` on; None: any number."""
        with self._moved:
            self._limit = steps
            self._moved.notify_all()

    def reset(self) -> None:
        """Count anew; all shards stand still."""
        with self._moved:
            self._steps.clear()
            self._limit = 0

    def stands(self, shard: AttentionShard) -> bool:
        """True if the shard has made its steps and wants another."""
        with self._moved:
            return self._limit is not None and self._steps[shard.name] > self._limit


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.allow(None)


def drawn(prompt: list[int], seed: int) -> pb.GenerateRequest:
    request = ids_request(prompt, TOKENS)
    request.sampling.CopyFrom(pb.SamplingParameters(temperature=1.0, seed=seed))
    return request


def requests() -> list[pb.GenerateRequest]:
    """Eight greedy ones and eight that are drawn."""
    return [ids_request(p, TOKENS) for p in PROMPTS] + [drawn(p, seed=7 + n) for n, p in enumerate(PROMPTS)]


def tokens_of(call: Iterator[pb.GenerateResponse]) -> list[int]:
    """All tokens of a stream, each message of which continues the one before."""
    tokens: list[int] = []
    for message in call:
        tokens += message.token_ids
        assert message.next_index == len(tokens)
    return tokens


def all_tokens(client: Client) -> list[list[int]]:
    """Those of the sixteen, with nothing in their way."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda request: client.generate(request).tokens, requests()))


@contextmanager
def amid_streams(client: Client, gate: Gate, shards: list[AttentionShard]) -> Iterator[list[list[int]]]:
    """In the block every stream has had some tokens and none has all; after it the list has those of each."""
    gate.reset()
    calls = [client.inference.Generate(request, timeout=100) for request in requests()]
    until(lambda: sum(shard.stats().waiting + shard.stats().running for shard in shards) == len(calls))
    gate.allow(40)
    until(lambda: all(gate.stands(shard) for shard in shards))
    results: list[list[int]] = []
    yield results
    gate.allow(None)
    with ThreadPoolExecutor(len(calls)) as pool:
        results += pool.map(tokens_of, calls)


@contextmanager
def newcomer(found: Actors) -> Iterator[tuple[AttentionShard, AttentionPeer]]:
    """Another attention shard, on the router of the first; not attached to the gateway."""
    shard = found.twin("attention-0", "newcomer")
    address = shard.load()
    shard.connect(found.of(Router)[0]._endpoint.address, Medium.LOCAL, 5.0)
    with ThreadPoolExecutor() as pool:
        try:
            yield shard, AttentionPeer(LocalHandle("newcomer", shard, pool), address)
        finally:
            shard.stop()


def test_the_streams_of_a_lost_shard_go_on_with_the_same_tokens(
    checkpoint: tuple[Path, Any], local: Local, actors: Actors, gate: Gate
) -> None:
    with running_cluster(local(checkpoint[0], **{"attention.replicas": 2})) as doors, Client(doors.grpc) as client:
        lost, other = actors.of(AttentionShard)
        undisturbed = all_tokens(client)
        assert greedy(checkpoint[1], PROMPTS[0], TOKENS).agrees(undisturbed[0])
        with amid_streams(client, gate, [lost, other]) as results:
            assert (lost.stats().running, other.stats().running) == (8, 8)
            stop = threading.Thread(target=lost.stop)
            stop.start()  # it waits for the step that the shard is in
        stop.join()
        assert results == undisturbed
        assert actors["gateway-0"].stats().replays == 8
        until(lambda: other.stats().running == 0)
        assert other.stats().kv_blocks_free == other.stats().kv_blocks


def test_streams_move_from_a_retired_shard_to_one_that_came_later(
    checkpoint: tuple[Path, Any], local: Local, actors: Actors, gate: Gate
) -> None:
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        gateway: Gateway = actors["gateway-0"]
        (old,) = actors.of(AttentionShard)
        undisturbed = all_tokens(client)
        with newcomer(actors) as (new, peer):
            with amid_streams(client, gate, [old]) as results:
                with pytest.raises(OnlyShard, match="no other could take its 16 streams"):
                    gateway.retire(old.name, 0.01)
                gateway.attach(peer, Medium.LOCAL, 5.0)
                assert gateway.retire(old.name, 0.01) == 16
                until(lambda: new.stats().waiting + new.stats().running == 16)
            assert results == undisturbed
            assert gateway.stats().replays == 16
            until(lambda: {wire.peer for wire in old.stats().wires} == {actors.of(Router)[0].name})
            stats = old.stats()
            assert (stats.running, stats.waiting, stats.kv_blocks_free) == (0, 0, stats.kv_blocks)
            with pytest.raises(ValueError, match="'newcomer' is or was connected"):
                gateway.attach(peer, Medium.LOCAL, 5.0)
            assert client.tokens(PROMPTS[0], 8) == undisturbed[0][:8]


def test_clients_that_leave_while_their_streams_wait_leave_nothing(
    checkpoint: tuple[Path, Any], local: Local, actors: Actors, gate: Gate
) -> None:
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        (shard,) = actors.of(AttentionShard)
        gate.reset()
        calls = [client.inference.Generate(ids_request(prompt, TOKENS), timeout=100) for prompt in PROMPTS[:3]]
        until(lambda: shard.stats().waiting + shard.stats().running == 3)
        gate.allow(10)
        until(lambda: gate.stands(shard))
        gateway: Gateway = actors["gateway-0"]
        stop = threading.Thread(target=shard.stop)
        stop.start()
        gate.allow(None)
        stop.join()
        assert gateway.stats().streams == 3
        for call in calls:
            call.cancel()
        until(lambda: gateway.stats().streams == 0)


def test_a_request_may_come_before_the_wire_of_its_gateway(
    checkpoint: tuple[Path, Any], local: Local, actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.attention._GATEWAY_WAIT_S", 60.0)
    request = GenerationRequest("late/0", (1, 2, 3), SamplingParams(), max_tokens=2, gateway="late")
    with (
        running_cluster(local(checkpoint[0])),
        newcomer(actors) as (shard, peer),
        ThreadPoolExecutor() as pool,
        closing(actors.twin("gateway-0", "late")._endpoint) as endpoint,
    ):
        submission = pool.submit(shard.submit, (request,))
        until(lambda: bool(shard._gateway_came._waiters))
        with closing(endpoint.connect(peer.address, time.monotonic() + 5, Medium.LOCAL)) as wire:
            assert submission.result(30) is None
            frame = wire.recv(time.monotonic() + 30)
            assert frame.kind == Kind.TOKENS
            assert decode_tokens(frame)[0].request_id == "late/0"
        monkeypatch.setattr("actors.attention._GATEWAY_WAIT_S", 0.01)
        refusal = shard.submit((GenerationRequest("x/0", (1,), SamplingParams(), max_tokens=2, gateway="nobody"),))
        assert refusal is not None
        assert (refusal.kind, refusal.message) == (Refusal.UNAVAILABLE, "no wire to gateway nobody")
