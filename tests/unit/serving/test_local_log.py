"""Clusters whose telemetry fails, or whose requests do: what clients get, and what the log says of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import httpx
import pytest
from expertmesh.v1 import control_pb2 as pb
from opentelemetry.sdk.trace import Span
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import actors.step_runner
from actors import batch_spans, request_spans
from actors.log_fields import fields_of
from actors.request_spans import RequestSpans
from actors.timeline import Timelines
from cluster.config import ServerConfig
from cluster.launch import running_cluster
from cluster.telemetry.observed import ObservedRequest
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, ids_request
from tests.span_recorder import TRACE_ID, TRACEPARENT

Local = Callable[..., ServerConfig]
PROMPT = random_ids(7, seed=3, vocab=VOCABULARY)
COUNT = 6


@pytest.fixture
def spans(spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """So that what comes with a trace is traced, in every step that can be."""
    monkeypatch.setattr(request_spans, "BETWEEN_STEPS_S", 0.0)
    return spans


def traced(client: Client) -> list[int]:
    """The tokens of a traced request."""
    call = client.inference.Generate(ids_request(PROMPT, COUNT), timeout=60, metadata=[("traceparent", TRACEPARENT)])
    return [token for message in call for token in message.token_ids]


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (Timelines, ("admit", "begin_step", "note")),
        (RequestSpans, ("admit", "begin_step", "note")),
        (batch_spans, ("_TRACER", "traceparent_of")),
        (ObservedRequest, ("_describe", "_count", "_measure", "_log", "_end_span", "_ids")),
        (Span, ("set_attribute", "set_attributes", "add_event", "end")),
    ],
    ids=["timelines", "request spans", "batch spans", "gateway", "all spans"],
)
def test_telemetry_that_fails_costs_no_token(
    checkpoint: tuple[Path, Any],
    local: Local,
    spans: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: Any,
    names: tuple[str, ...],
) -> None:
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        wanted = traced(client)
        assert len(wanted) == COUNT
        broken = Mock(side_effect=KeyError("broken"), **{"start_span.side_effect": KeyError("broken")})
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(place, name, broken)
            assert [traced(client), client.tokens(PROMPT, COUNT)] == [wanted] * 2
        assert "serving goes on" in caplog.text
        assert traced(client) == wanted
        assert {actor.state for actor in client.cluster().actors} == {pb.ACTOR_STATE_READY}


def test_an_internal_error_is_logged_with_its_request(
    checkpoint: tuple[Path, Any],
    local: Local,
    spans: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(actors.step_runner, "sample_chunks", Mock(side_effect=RuntimeError("a bug")))
    with running_cluster(local(checkpoint[0])) as doors, Client(doors.grpc) as client:
        with pytest.raises(grpc.RpcError):
            traced(client)
        body = {"model": checkpoint[0].name, "prompt": list(PROMPT), "max_tokens": COUNT}
        headers = {"traceparent": TRACEPARENT}
        answer = httpx.post(f"http://{doors.http}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 500
    records = [entry for entry in caplog.records if entry.getMessage().startswith("internal error ")]
    access = [vars(entry)["fields"] for entry in caplog.records if entry.name == "expertmesh.access"]
    void = [vars(entry)["fields"] for entry in caplog.records if entry.getMessage().startswith("a step is void")]
    assert len(records) == len(access) == len(void) == 2
    for entry, request in zip(records, access, strict=True):
        assert entry.exc_info
        told = fields_of(entry.exc_info[1])
        assert told["trace_id"] == f"{TRACE_ID:032x}"
        assert told == {key: request[key] for key in ("request_id", "trace_id", "span_id")}
    assert void == [{"requests": 1, "trace_ids": f"{TRACE_ID:032x}"}] * 2


def test_bytes_that_actors_sent_reach_the_view(checkpoint: tuple[Path, Any], local: Local) -> None:
    with running_cluster(local(checkpoint[0], **{"experts.shards": 2})) as doors, Client(doors.grpc) as client:
        client.tokens(PROMPT, COUNT)
        view = client.cluster()
    sent: dict[str, int] = {}
    for wire in view.wires:
        sent[getattr(wire, "from")] = sent.get(getattr(wire, "from"), 0) + wire.bytes_sent
    counted = {actor.name: dict(actor.bytes_sent) for actor in view.actors if actor.bytes_sent}
    assert counted == {name: {"local": count} for name, count in sent.items()}
    assert counted.keys() == {"attention-0", "router-0", "expert-0", "expert-1"}
    assert {wire.to for wire in view.wires if getattr(wire, "from") == "expert-0"} == {"router-0"}


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    """The access log is in it."""
    caplog.set_level(logging.INFO)
