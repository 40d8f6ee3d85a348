"""Spans of traced requests across attention shard, router and expert shards; and that all others are as if untraced."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from expertmesh.v1 import control_pb2 as pb
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from actors import groups, moe_client, request_spans
from actors.attention import AttentionShard
from actors.engine.request import GenerationRequest
from actors.expert import ExpertShard
from actors.frames import Kind
from actors.moe_client import MoEClient
from actors.refusals import Refusal
from actors.transport.base import Frame, Medium, PeerGone
from actors.transport.frame import byte_view
from actors.transport.local import LocalWire
from actors.transport.nccl import NcclWire
from cluster import gpus
from cluster.config import ServerConfig
from cluster.launch import running_cluster
from tests.local_cluster import running
from tests.multiprocess.transport.nccl_double import DoubleBackend
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, tiny_model
from tests.span_recorder import PARENT_ID, TRACE_ID, TRACEPARENT, about, named, parent_id, span_id
from tests.unit.serving.conftest import Actors
from tests.waiting import until

Local = Callable[..., ServerConfig]
COUNT = 12
TRACED = 11
"""Prompts of this length belong to traced requests here."""

PROMPTS = [random_ids(length, seed=length, vocab=VOCABULARY) for length in (3, TRACED, 17)]
LAYERS = (1, 2)
Frames = list[tuple[int, int, list[int]]]


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``tracing(traceparent)``: from now on requests with TRACED tokens come with it, all others with none."""
    honest, given = AttentionShard.submit, [""]

    def submit(shard: AttentionShard, requests: tuple[GenerationRequest, ...]) -> Refusal | None:
        mark = given[0] if len(requests[0].prompt_ids) == TRACED else ""
        return honest(shard, tuple(dataclasses.replace(request, traceparent=mark) for request in requests))

    monkeypatch.setattr(AttentionShard, "submit", submit)
    monkeypatch.setattr(request_spans, "BETWEEN_STEPS_S", 0.0)
    return lambda traceparent: given.__setitem__(0, traceparent)


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> Frames:
    """(kind, layer, sizes of the parts) of every frame that is sent over local wires."""
    sent: Frames = []
    honest = LocalWire.send

    def send(wire: LocalWire, kind: int, tag: Any, parts: Any, deadline: float) -> None:
        sent.append((kind, tag.layer, [len(byte_view(part)) for part in parts]))
        honest(wire, kind, tag, parts, deadline)

    monkeypatch.setattr(LocalWire, "send", send)
    return sent


def ended(spans: InMemorySpanExporter) -> None:
    """Wait until the traced request is over for its shard as well: the client knows a moment earlier."""
    until(lambda: bool(named(spans, "decode")))


def one(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = named(spans, name)
    return span


def within(child: ReadableSpan, parent: ReadableSpan) -> bool:
    assert child.start_time is not None
    assert child.end_time is not None
    return (parent.start_time or 0) <= child.start_time <= child.end_time <= (parent.end_time or 0)


def check_step(spans: InMemorySpanExporter, shards: int) -> ReadableSpan:
    """One step below decode, a dispatch for each layer, below these one span of each shard; returns the step."""
    step, decode = one(spans, "step"), one(spans, "decode")
    assert parent_id(step) == span_id(decode)
    assert within(step, decode)
    batches = named(spans, "dispatch")
    assert [about(batch, "layer") for batch in batches] == list(LAYERS)
    for batch in batches:
        assert parent_id(batch) == span_id(step)
        assert within(batch, step)
        assert about(batch, "rows") == about(step, "rows")
        assert batch.attributes["expertmesh.actor"] == "router-0"
        computed = [span for span in named(spans, "experts") if parent_id(span) == span_id(batch)]
        assert len(computed) == about(batch, "shards") == len({about(span, "actor") for span in computed})
        assert 1 <= len(computed) <= shards
        for span in computed:
            assert within(span, batch)
            assert about(span, "layer") == about(batch, "layer")
        assert sum(span.attributes["expertmesh.pairs"] for span in computed) == 4 * batch.attributes["expertmesh.rows"]
    assert len(named(spans, "experts")) == sum(batch.attributes["expertmesh.shards"] for batch in batches)
    return step


def test_one_traced_request_among_others(
    checkpoint: tuple[Path, Any],
    local: Local,
    spans: InMemorySpanExporter,
    tracing: Callable[[str], None],
    frames: Frames,
) -> None:
    with running_cluster(local(checkpoint[0], **{"experts.shards": 3})) as doors, Client(doors.grpc) as client:
        untraced = client.tokens_together(PROMPTS, COUNT)
        assert {(kind, len(parts)) for kind, _, parts in frames if kind in (Kind.ROWS, Kind.DISPATCH)} == {
            (Kind.ROWS, 1),
            (Kind.DISPATCH, 3),
        }
        assert spans.get_finished_spans() == ()
        frames.clear()
        tracing(TRACEPARENT)
        assert client.tokens_together(PROMPTS, COUNT) == untraced
        ended(spans)
    found = spans.get_finished_spans()
    assert {span.context.trace_id for span in found} == {TRACE_ID}
    assert sorted({span.name for span in found}) == ["decode", "dispatch", "experts", "prefill", "queue", "step"]
    queue, prefill, decode = (one(spans, name) for name in ("queue", "prefill", "decode"))
    for span in (queue, prefill, decode):
        assert parent_id(span) == PARENT_ID
        assert about(span, "actor") == "attention-0"
        assert span.status.status_code is StatusCode.UNSET
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert about(prefill, "prompt_tokens") == TRACED
    assert (about(decode, "output_tokens"), about(decode, "finish_reason")) == (COUNT, "length")
    assert about(decode, "preemptions") == 0
    step = check_step(spans, shards=3)
    assert about(step, "actor") == "attention-0"
    assert 1 <= step.attributes["expertmesh.requests"] <= len(PROMPTS)
    waited = step.attributes["expertmesh.experts_wait_s"]
    assert 0 < waited <= (step.end_time - step.start_time) / 1e9
    marked = [(kind, layer) for kind, layer, parts in frames if parts and parts[-1] == len(TRACEPARENT)]
    wanted = [(Kind.ROWS, layer) for layer in LAYERS]
    wanted += [(Kind.DISPATCH, span.attributes["expertmesh.layer"]) for span in named(spans, "experts")]
    assert sorted(marked) == sorted(wanted)


def test_an_answer_of_one_token_has_no_step(
    checkpoint: tuple[Path, Any], local: Local, spans: InMemorySpanExporter, tracing: Callable[[str], None]
) -> None:
    tracing(TRACEPARENT)
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        assert len(client.tokens(PROMPTS[1], 1)) == 1
        ended(spans)
    assert [span.name for span in spans.get_finished_spans()] == ["queue", "prefill", "decode"]
    decode = one(spans, "decode")
    assert decode.start_time == decode.end_time
    assert (about(decode, "output_tokens"), about(decode, "finish_reason")) == (1, "length")


@pytest.mark.parametrize("traceparent", [TRACEPARENT[:-1] + "0", "garbage"])
def test_what_is_not_sampled_or_cannot_be_read_makes_no_spans(
    checkpoint: tuple[Path, Any],
    local: Local,
    spans: InMemorySpanExporter,
    tracing: Callable[[str], None],
    frames: Frames,
    traceparent: str,
) -> None:
    tracing(traceparent)
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        assert len(client.tokens(PROMPTS[1], COUNT)) == COUNT
    assert spans.get_finished_spans() == ()
    assert {len(parts) for kind, _, parts in frames if kind == Kind.ROWS} == {1}


def test_one_step_a_second_at_most(
    checkpoint: tuple[Path, Any],
    local: Local,
    spans: InMemorySpanExporter,
    tracing: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracing(TRACEPARENT)
    monkeypatch.setattr(request_spans, "BETWEEN_STEPS_S", 3600.0)
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        for _ in range(3):
            client.tokens(PROMPTS[1], COUNT)
        until(lambda: len(named(spans, "decode")) == 3)
    assert len(named(spans, "step")) == 1


def test_of_many_layers_sixteen_are_traced(
    tmp_path: Path, local: Local, spans: InMemorySpanExporter, tracing: Callable[[str], None]
) -> None:
    tiny_model(tmp_path, "glm4_moe", num_hidden_layers=24)
    tracing(TRACEPARENT)
    with running_cluster(local(tmp_path)) as doors, Client(doors.grpc) as client:
        client.tokens(PROMPTS[1], 4)
        ended(spans)
    layers = [span.attributes["expertmesh.layer"] for span in named(spans, "dispatch")]
    assert layers == sorted(moe_client.traced_layers(range(1, 24)))
    assert (len(layers), layers[0], layers[-1]) == (16, 1, 23)


@pytest.mark.parametrize("dies", [True, False], ids=["it dies", "it refuses"])
def test_rows_that_are_sent_again_stay_in_the_trace(
    checkpoint: tuple[Path, Any],
    local: Local,
    spans: InMemorySpanExporter,
    tracing: Callable[[str], None],
    actors: Actors,
    monkeypatch: pytest.MonkeyPatch,
    dies: bool,
) -> None:
    """One of two shards that both hold everything fails in the traced step."""
    config = local(checkpoint[0], **{"experts.shards": 2, "experts.min_replicas": 2})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        wanted = client.tokens(PROMPTS[1], COUNT)
        fails = actors.of(ExpertShard)[0]

        def forward(*_: Any) -> torch.Tensor:
            if dies:
                for wire in fails._loop.wires():
                    wire.close()
            raise PeerGone("killed")

        traced = ExpertShard._traced

        def fail_once(*args: Any) -> torch.Tensor:
            monkeypatch.setattr(fails, "_traced", lambda *args: traced(fails, *args))
            with monkeypatch.context() as patch:
                patch.setattr(fails, "_forward", forward)
                return traced(fails, *args)

        monkeypatch.setattr(fails, "_traced", fail_once)
        tracing(TRACEPARENT)
        assert client.tokens(PROMPTS[1], COUNT) == wanted
        ended(spans)
    (failed,) = [span for span in named(spans, "experts") if span.status.status_code is StatusCode.ERROR]
    assert failed.attributes["error.type"] == "PeerGone"
    (batch,) = [span for span in named(spans, "dispatch") if about(span, "reroutes")]
    assert (parent_id(failed), about(batch, "reroutes"), about(batch, "shards")) == (span_id(batch), 1, 2)
    assert batch.status.status_code is StatusCode.UNSET
    computed = [span for span in named(spans, "experts") if parent_id(span) == span_id(batch) and span is not failed]
    assert {about(span, "actor") for span in computed} == {"expert-1"}
    assert sum(span.attributes["expertmesh.pairs"] for span in computed) == 4
    assert len(named(spans, "dispatch")) == len(LAYERS)


def test_a_void_step_says_so_in_all_its_spans(
    checkpoint: tuple[Path, Any],
    local: Local,
    spans: InMemorySpanExporter,
    tracing: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only shard refuses the traced batch: the router fails it, the step is void, the gateway submits anew."""
    monkeypatch.setattr(request_spans, "BETWEEN_STEPS_S", 3600.0)
    secret, honest = "row 17 is secret", ExpertShard._traced

    def traced(shard: ExpertShard, *args: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(shard, "_forward", Mock(side_effect=ValueError(secret)))
            return honest(shard, *args)

    config = local(checkpoint[0], **{"experts.shards": 1})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        wanted = client.tokens(PROMPTS[1], COUNT)
        tracing(TRACEPARENT)
        monkeypatch.setattr(ExpertShard, "_traced", traced)
        assert client.tokens(PROMPTS[1], COUNT) == wanted
        until(lambda: len(named(spans, "decode")) == 2)
    batch, step, computed = (one(spans, name) for name in ("dispatch", "step", "experts"))
    first, second = named(spans, "decode")
    assert parent_id(step) == span_id(first)
    for span, kind in ((computed, "ValueError"), (batch, "failed"), (step, "unavailable"), (first, "unavailable")):
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, kind)
        assert span.attributes["error.type"] == kind
    assert [about(span, "output_tokens") for span in (first, second)] == [1, COUNT - 1]
    assert about(first, "finish_reason") == "unavailable"
    assert second.status.status_code is StatusCode.UNSET
    assert secret not in "".join(span.to_json() for span in spans.get_finished_spans())


def test_over_nccl_the_trace_lies_in_host_memory(
    checkpoint: tuple[Path, Any],
    local: Local,
    spans: InMemorySpanExporter,
    tracing: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups, "make_backend", lambda device: DoubleBackend())
    monkeypatch.setattr(gpus, "requirements_missing", list)
    sent: list[bool] = []
    honest = NcclWire.ask

    def ask(wire: NcclWire, kind: int, tag: Any, parts: Any, answer_bytes: int, deadline: float) -> None:
        if kind == Kind.DISPATCH:
            sent.append(len(parts) == 4 and isinstance(parts[0], torch.Tensor))
        honest(wire, kind, tag, parts, answer_bytes, deadline)

    monkeypatch.setattr(NcclWire, "ask", ask)
    tracing(TRACEPARENT)
    config = local(checkpoint[0], **{"experts.shards": 2}).model_copy(update={"transport": Medium.NCCL.value})
    with running(config) as (client, _):
        assert len(client.tokens(PROMPTS[1], COUNT)) == COUNT
        ended(spans)
    check_step(spans, shards=2)
    assert sum(sent) == len(named(spans, "experts"))
    gc.collect()  # the double frees its descriptors with its objects
    until(lambda: not [thread.name for thread in threading.enumerate() if thread.name.endswith("-watchdog")])


def test_counters_reach_the_view(checkpoint: tuple[Path, Any], local: Local) -> None:
    with running_cluster(local(checkpoint[0], **{"experts.shards": 2})) as doors, Client(doors.grpc) as client:
        client.tokens(PROMPTS[1], COUNT)
        (attention,), (router,) = client.load(pb.ROLE_ATTENTION), client.load(pb.ROLE_ROUTER)
        experts = client.load(pb.ROLE_EXPERT)
    load = attention.attention
    assert load.moe_batches == router.router.batches == load.steps * len(LAYERS) == COUNT * len(LAYERS)
    assert router.router.dispatch_s > 0
    assert router.router.combine_s > 0
    assert 0 < load.experts_wait_s < load.busy_s
    assert router.router.dispatch_s + router.router.combine_s < load.busy_s
    for actor in experts:
        assert 0 < actor.expert.batches <= load.moe_batches
        assert 0 < actor.expert.busy_s < router.router.dispatch_s
    assert sum(actor.expert.batches for actor in experts) >= load.moe_batches


def test_the_waits_of_all_steps_add_up(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = MoEClient._wait

    def wait(client: MoEClient) -> Frame:
        client.waited_s += 1.0
        return honest(client)

    monkeypatch.setattr(MoEClient, "_wait", wait)
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        client.tokens(PROMPTS[1], COUNT)
        (actor,) = client.load(pb.ROLE_ATTENTION)
    load = actor.attention
    assert load.moe_batches <= load.experts_wait_s < load.moe_batches + load.busy_s
