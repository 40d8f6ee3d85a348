"""A timeline of a cluster in this process: its spans, its errors, and the command that writes it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from expertmesh.v1 import control_pb2 as pb
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.cli.trace import told, write_whole
from cluster.config import ServerConfig
from cluster.controller import Controller
from tests.local_cluster import crash, running
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, ids_request
from tests.trace_events import check_events
from tests.waiting import until

Local = Callable[..., ServerConfig]
PROMPT = random_ids(4, seed=0, vocab=VOCABULARY)


@pytest.fixture(scope="module")
def cluster(checkpoint: tuple[Path, Any], local: Local) -> Iterator[tuple[Client, Controller]]:
    with running(local(checkpoint[0], **{"experts.shards": 2})) as running_one:
        yield running_one


@contextmanager
def busy(client: Client) -> Iterator[None]:
    """Requests of three choices run one after the other for as long as the block lasts: no prompt beside streams, so
    that each step is one pass through the layers."""
    over = threading.Event()
    request = ids_request(PROMPT, 16, n=3)

    def work() -> None:
        while not over.is_set():
            client.generate(request)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: client.load(pb.ROLE_ATTENTION)[0].attention.running > 0)
        yield
    finally:
        over.set()
        thread.join()


def door(client: Client) -> str:
    return str(client.load(pb.ROLE_GATEWAY)[0].gateway.address)


def end(span: pb.TracedSpan) -> int:
    return span.start_ns + span.duration_ns


def within(inner: pb.TracedSpan, outer: pb.TracedSpan) -> bool:
    return outer.start_ns <= inner.start_ns and end(inner) <= end(outer)


def named(actor: pb.TracedActor, name: str) -> list[pb.TracedSpan]:
    return [span for span in actor.spans if span.name == name]


def test_the_spans_of_five_steps(cluster: tuple[Client, Controller]) -> None:
    client, _ = cluster
    with busy(client):
        traced = client.control.Trace(pb.TraceRequest(steps=5, timeout_s=60), timeout=90)
    assert traced.steps == 5
    assert all(actor.pid and actor.spans for actor in traced.actors)
    assert not any(actor.dropped or actor.clock_error_ns for actor in traced.actors)
    (attention,) = (actor for actor in traced.actors if actor.role == pb.ROLE_ATTENTION)
    (router,) = (actor for actor in traced.actors if actor.role == pb.ROLE_ROUTER)
    experts = [actor for actor in traced.actors if actor.role == pb.ROLE_EXPERT]
    (gateway,) = (actor for actor in traced.actors if actor.role == pb.ROLE_GATEWAY)
    assert len(experts) == 2

    steps = named(attention, "step")
    numbers = [step.numbers["number"] for step in steps]
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    assert all(step.numbers["rows"] >= step.numbers["requests"] >= 1 for step in steps)
    assert 3 in {step.numbers["rows"] for step in steps}
    assert all(step.numbers["micro_batches"] == 1 for step in steps)
    for step in steps:
        # what the step before has brought is published while its first layer's rows are away
        inside = [span.name for span in attention.spans if within(span, step) and span.name != "publish"]
        whole = [name for name, _ in itertools.groupby(inside)]
        layers = ["compute", "rows out", "shared expert", "wait for experts"] * 2
        assert whole[:11] == ["step", "schedule", "forward", *layers]
        assert [name for name in whole[11:] if name != "compute"] == ["head", "sample"]
    assert sum(span.numbers["events"] for span in named(gateway, "deliver")) >= 5

    for step in steps:
        for sent, wait in zip(named(attention, "rows out"), named(attention, "wait for experts"), strict=True):
            assert sent.numbers["layer"] == wait.numbers["layer"]
            if within(sent, step):
                check_batch(sent, wait, router, experts)


def check_batch(
    sent: pb.TracedSpan, wait: pb.TracedSpan, router: pb.TracedActor, experts: list[pb.TracedActor]
) -> None:
    """One layer's rows: at the router, at the expert shards, and back."""

    def during(span: pb.TracedSpan) -> bool:
        return sent.start_ns <= span.start_ns and end(span) <= end(wait)

    (gate,), (dispatch,), (out,) = ([s for s in named(router, n) if during(s)] for n in ("gate", "dispatch", "experts"))
    assert within(gate, dispatch)
    assert gate.lane == dispatch.lane
    assert gate.start_ns <= end(gate) <= out.start_ns
    assert out.lane != gate.lane
    assert out.numbers["layer"] == sent.numbers["layer"]
    assert out.numbers["rows"] == sent.numbers["rows"]
    computed = [
        span for actor in experts for span in named(actor, "compute") if span.numbers["batch"] == out.numbers["batch"]
    ]
    assert all(within(span, out) and during(span) for span in computed)
    assert sum(span.numbers["pairs"] for span in computed) % sent.numbers["rows"] == 0
    assert all(1 <= span.numbers["rows"] <= sent.numbers["rows"] for span in computed)
    assert all(span.numbers["epoch"] == 1 for span in computed)
    assert 1 <= len(computed) <= 2


def test_the_command_writes_what_perfetto_reads(cluster: tuple[Client, Controller], tmp_path: Path) -> None:
    client, _ = cluster
    output = tmp_path / "out.json"
    output.write_text("older")
    with busy(client):
        done = CliRunner().invoke(app, ["trace", "--steps", "3", "-o", str(output), "--target", door(client)])
    assert done.exit_code == 0, done.output
    check_events(json.loads(output.read_text()))
    last = done.stdout.splitlines()[-1]
    assert last.startswith("3 steps, ")
    assert f"spans of 5 actors: {output}; open it at https://ui.perfetto.dev" in last
    assert "T_a " in done.stdout
    assert "wait for experts" in done.stdout
    assert list(tmp_path.iterdir()) == [output]


def test_no_step_no_file(cluster: tuple[Client, Controller], tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    options = ["--timeout", "0.05", "-o", str(output), "--target", door(cluster[0])]
    done = CliRunner().invoke(app, ["trace", *options])
    assert done.exit_code == 1
    assert done.stderr == "error: no step was run within 0.05 s; nothing is written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "out.json"
    output.write_text("older")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(output, "newer")
    assert output.read_text() == "older"
    assert list(tmp_path.iterdir()) == [output]


def test_what_is_missing_is_told() -> None:
    steps = [pb.TracedSpan(name="step")] * 3
    trace = pb.TraceResponse(
        actors=[
            pb.TracedActor(name="attention-0", role=pb.ROLE_ATTENTION, pid=1, spans=steps, dropped=1200),
            pb.TracedActor(name="attention-1", role=pb.ROLE_ATTENTION, pid=2),
            pb.TracedActor(name="expert-0", role=pb.ROLE_EXPERT),
        ]
    )
    text = "0 to 3 of 5 steps, 3 spans of 2 actors, 1,200 more dropped, no answer from expert-0"
    assert told(trace, 5) == text
    del trace.actors[1:]
    trace.steps, trace.actors[0].dropped = 3, 0
    assert told(trace, 3) == "3 steps, 3 spans of 1 actors"
    assert told(trace, 4) == "3 of 4 steps, 3 spans of 1 actors"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--steps", "0"], "--steps: 0; allowed are 1 to 1000"),
        (["--steps", "1001"], "--steps: 1001; allowed are 1 to 1000"),
        (["--timeout", "nan"], "--timeout: nan; allowed are 0 (30 s) to 600"),
        (["-o", "{folder}"], "--output: {folder}: is a folder; name a file"),
        (["-o", "{folder}/a/b.json"], "--output: {folder}/a/b.json: its folder does not exist"),
    ],
)
def test_arguments_that_cannot_be(options: list[str], complaint: str, tmp_path: Path) -> None:
    """Told before anybody is asked: there is no cluster."""
    given = [option.format(folder=tmp_path) for option in options]
    done = CliRunner().invoke(app, ["trace", *given, "--target", "127.0.0.1:1"])
    assert (done.exit_code, done.stderr) == (1, f"error: {complaint.format(folder=tmp_path)}\n")


def test_ctrl_c_stops_the_recording(cluster: tuple[Client, Controller], tmp_path: Path) -> None:
    client, controller = cluster
    recorded = recorder(controller, "attention-0")
    ended = threading.Event()

    def press() -> None:
        """Again, as a user would, where the first one came while gRPC was in compiled code, which swallows it."""
        until(lambda: waits(recorded))
        signal.raise_signal(signal.SIGINT)
        while not ended.wait(5.0) and waits(recorded):
            signal.raise_signal(signal.SIGINT)

    caught = threading.Thread(target=press)
    caught.start()
    output = tmp_path / "out.json"
    done = CliRunner().invoke(app, ["trace", "--timeout", "600", "-o", str(output), "--target", door(client)])
    ended.set()
    caught.join()
    assert done.exit_code == 130
    assert done.stderr.endswith("stopped; nothing is written\n")
    assert not output.exists()
    until(lambda: not waits(recorded))
    until(lambda: not recorder(controller, "expert-0")._on)


def waits(spans: Any) -> bool:
    """True while steps are wanted of it, also if the loop, which wakes up for nothing at times, has begun to record."""
    return bool(spans._armed or spans._on)


def recorder(controller: Controller, name: str) -> Any:
    member = controller._roster.find(name)
    assert member is not None
    return member.handle.actor._spans  # type: ignore[attr-defined]


def test_one_trace_at_a_time(cluster: tuple[Client, Controller]) -> None:
    client, controller = cluster
    first = client.control.Trace.future(pb.TraceRequest(steps=1, timeout_s=600))
    until(lambda: waits(recorder(controller, "attention-0")))
    with pytest.raises(grpc.RpcError) as refused:
        client.control.Trace(pb.TraceRequest(steps=1))
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(refused.value).details[0].Unpack(info)
    assert info.reason == "TRACE_RUNNING"
    client.control.Rebalance(pb.RebalanceRequest(), timeout=60)
    client.tokens(PROMPT, 2)
    assert first.result(timeout=60).steps == 1


@pytest.mark.parametrize("field", ["steps", "timeout_s"])
def test_a_request_that_cannot_be_names_its_field(cluster: tuple[Client, Controller], field: str) -> None:
    request = pb.TraceRequest(**{"steps": 1, field: 1001})
    with pytest.raises(grpc.RpcError) as refused:
        cluster[0].control.Trace(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    assert rpc_status.from_call(refused.value).details[0].Unpack(bad)
    assert [violation.field for violation in bad.field_violations] == [field]


def test_a_shard_that_dies_meanwhile_is_not_waited_for(checkpoint: tuple[Path, Any], local: Local) -> None:
    with running(local(checkpoint[0])) as (client, controller):
        waiting = client.control.Trace.future(pb.TraceRequest(steps=1, timeout_s=600))
        until(lambda: waits(recorder(controller, "attention-0")))
        crash(controller, "attention-0")
        traced = waiting.result(timeout=60)
    silent = {actor.name for actor in traced.actors if not actor.pid}
    assert {"attention-0"} <= silent <= {"attention-0", "router-0"}  # its router goes with it
    assert traced.steps == 0
