"""``expertmesh serve`` with a collector: what comes there, what a scrape gets, and what the log says."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from expertmesh.v1 import inference_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families

from tests.otlp_collector import Collector, collecting
from tests.processes import Serving, serving
from tests.serving import Client

MARKER = "zanzibar-marker"
SPAN_ID = "cd" * 8
FIRST, DECLINED, SECOND = "a1" * 16, "a2" * 16, "b1" * 16
"""Traces of the clients, in the order in which they call."""
TOKENS = 5


def traceparent(trace_id: str, flags: str = "01") -> str:
    """As a client sends it."""
    return f"00-{trace_id}-{SPAN_ID}-{flags}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def cluster(folder: Path, model: Path, **telemetry: Any) -> Iterator[tuple[Serving, int]]:
    """A local one, with the port of its metrics."""
    port = free_port()
    config = {
        "model": str(model),
        "transport": "local",
        "attention": {"kv_memory": "4MiB", "threads": 1},
        "experts": {"threads": 1},
        "gateway": {"port": 0, "http_port": 0, "metrics_port": port},
        "telemetry": {"log_format": "json", **telemetry},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with serving("--config", str(file)) as served:
        yield served, port


class Run:
    """What a cluster left behind that had these clients: three over gRPC (one of them does not want to be traced, one
    wants what is not served) and one over HTTP."""

    def __init__(self, collector: Collector, log: list[str], exposition: str) -> None:
        self.collector = collector
        self.log = log
        self.exposition = exposition

    def tree(self, trace_id: str) -> dict[str, list[dict[str, Any]]]:
        """The spans of a trace, by the id of their parent."""
        found: dict[str, list[dict[str, Any]]] = {}
        for span in self.collector.spans:
            if span["traceId"] == trace_id:
                found.setdefault(span["parentSpanId"], []).append(span)
        return found


@pytest.fixture(scope="module")
def run(checkpoint: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Made once for the tests of this file."""
    folder = tmp_path_factory.mktemp("telemetry")
    with collecting(folder / "otlp.jsonl") as collector:
        telemetry = {"otlp_endpoint": collector.endpoint, "otlp_headers": {"X-Key": "k"}, "trace_ratio": 0}
        with cluster(folder, checkpoint[0], **telemetry) as (served, port):
            _ask_grpc(served.address)
            _ask_http(served.http)
            exposition = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).raise_for_status().text
            assert served.stop() == 0, served.errors
        yield Run(collector, served.errors, exposition)


def _ask_grpc(address: str) -> None:
    stopping = pb.StoppingParameters(max_tokens=TOKENS, ignore_eos=True)
    request = pb.GenerateRequest(
        prompt=f"{MARKER} is", sampling=pb.SamplingParameters(temperature=0), stopping=stopping
    )
    with Client(address) as client:
        for header in (traceparent(FIRST), traceparent(DECLINED, flags="00")):
            list(client.inference.Generate(request, timeout=60, metadata=[("traceparent", header)]))
        request.model = f"{MARKER}\nforged"
        with pytest.raises(grpc.RpcError):
            list(client.inference.Generate(request, timeout=60))


def _ask_http(address: str) -> None:
    body = {"messages": [{"role": "user", "content": MARKER}], "max_tokens": TOKENS, "ignore_eos": True}
    body |= {"model": httpx.get(f"http://{address}/v1/models", timeout=30).json()["data"][0]["id"]}
    headers = {"traceparent": traceparent(SECOND), "X-Request-Id": "their-own"}
    httpx.post(f"http://{address}/v1/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()


@pytest.mark.parametrize(("trace_id", "operation"), [(FIRST, "text_completion"), (SECOND, "chat")])
def test_a_request_is_one_connected_trace(run: Run, trace_id: str, operation: str) -> None:
    tree = run.tree(trace_id)
    (server,) = tree.pop(SPAN_ID)
    assert server["name"].startswith(f"{operation} ")
    assert server["attributes"]["gen_ai.usage.output_tokens"] == str(TOKENS)
    phases = {span["name"]: span for span in tree.pop(server["spanId"])}
    assert phases.keys() == {"queue", "prefill", "decode"}
    # of what is traced, one step a second: the second request came too soon, unless the machine is slow
    steps = tree.pop(phases["decode"]["spanId"], [])
    assert len(steps) == 1 or trace_id != FIRST
    for step in steps:
        assert step["name"] == "step"
        dispatches = tree.pop(step["spanId"])
        assert {span["name"] for span in dispatches} == {"dispatch"}
        for dispatch in dispatches:
            assert {span["name"] for span in tree.pop(dispatch["spanId"])} == {"experts"}
    assert tree == {}, "spans without a parent"


def test_phases_follow_each_other_within_the_request(run: Run) -> None:
    tree = run.tree(FIRST)
    (server,) = tree[SPAN_ID]
    spans = sorted(tree[server["spanId"]], key=lambda span: int(span["startTimeUnixNano"]))
    times = [int(span[key]) for span in spans for key in ("startTimeUnixNano", "endTimeUnixNano")]
    assert times == sorted(times)
    assert int(server["startTimeUnixNano"]) <= times[0]
    # tokens are on their way when the shard's part of it ends
    assert times[-1] - int(server["endTimeUnixNano"]) < 50e6


def test_who_does_not_want_to_be_traced_is_not(run: Run) -> None:
    assert run.tree(DECLINED) == {}
    assert {span["traceId"] for span in run.collector.spans} == {FIRST, SECOND}, "trace_ratio is 0"


def test_exports_are_compressed_and_carry_the_configured_headers(run: Run) -> None:
    headers = [{key.lower(): value for key, value in export["headers"].items()} for export in run.collector.exports]
    assert headers
    assert all(found["x-key"] == "k" and found["content-encoding"] == "gzip" for found in headers)


def test_metrics_are_exported_too(run: Run) -> None:
    points = run.collector.metrics["expertmesh.generated.tokens"]["sum"]["dataPoints"]
    assert sum(float(point["asDouble"] if "asDouble" in point else point["asInt"]) for point in points) == 3 * TOKENS


def test_a_scrape_counts_exactly(run: Run) -> None:
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(run.exposition):
        for sample in family.samples:
            samples[sample.name] = samples.get(sample.name, 0) + sample.value
    assert samples["expertmesh_generated_tokens_total"] == 3 * TOKENS
    assert samples["expertmesh_attention_tokens_total"] == 3 * TOKENS
    assert samples["expertmesh_requests_finished_total"] == 4
    assert samples["gen_ai_server_request_duration_seconds_count"] == 4
    assert samples["expertmesh_request_queue_seconds_count"] == 3
    assert samples["expertmesh_request_prefill_seconds_count"] == 3
    assert samples["expertmesh_token_interval_seconds_count"] == 3 * (TOKENS - 1)
    assert samples["expertmesh_controller_up"] == 1
    assert samples["expertmesh_streams_open"] == 0
    assert samples["expertmesh_expert_rows_total"] > 0
    assert samples["expertmesh_wire_sent_bytes_total"] > 0
    assert samples["expertmesh_router_batches_total"] == samples["expertmesh_attention_moe_batches_total"] > 0
    assert samples["expertmesh_expert_batch_duration_seconds"] > 0
    assert samples["expertmesh_attention_batch_duration_seconds"] > 0


def test_no_word_of_a_prompt_leaves_the_process(run: Run) -> None:
    told = [span for span in run.collector.spans if MARKER in json.dumps(span)]
    assert told == []
    for text in (run.collector.text, "".join(run.log), run.exposition):
        assert MARKER not in text


def test_the_log_is_json_with_one_access_record_a_request(run: Run) -> None:
    lines = [json.loads(line) for line in run.log if line.startswith("{")]
    rest = [line for line in run.log if not line.startswith("{") and line.strip()]
    assert rest == ["stopping\n"]
    access = [line for line in lines if line["logger"] == "expertmesh.access"]
    assert [line["door"] for line in access] == ["grpc", "grpc", "grpc", "http"]
    assert [line.get("finish_reason", line.get("error")) for line in access] == [
        "length",
        "length",
        "not_found",
        "length",
    ]
    assert access[0]["trace_id"] == FIRST
    assert [line["completion_tokens"] for line in access] == [TOKENS, TOKENS, 0, TOKENS]
    assert access[2]["model"] == "other"
    assert len({line["request_id"] for line in access}) == 4, "also of the one that was refused"
    assert access[3]["client_request_id"] == "their-own"


def test_a_collector_that_is_not_there_holds_nothing_up(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with cluster(tmp_path, checkpoint[0], otlp_endpoint=endpoint, metrics_interval_s=0.1) as (served, _):
        with Client(served.address) as client:
            request = pb.GenerateRequest(prompt="x", stopping=pb.StoppingParameters(max_tokens=TOKENS, ignore_eos=True))
            for _ in range(30):
                client.generate(request)
        began = time.monotonic()
        assert served.stop() == 0, served.errors
        assert time.monotonic() - began < 10
    complaints = [line for line in served.errors if "opentelemetry" in line]
    assert 1 <= len(complaints) <= 8, complaints
