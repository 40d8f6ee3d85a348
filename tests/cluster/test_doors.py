"""A cluster of processes behind its HTTP door, observed from outside: one connected trace, one scrape, one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.conftest import COUNT, PROMPTS, server_file
from tests.otlp_collector import Collector, collecting
from tests.processes import Serving, run, serving
from tests.serving import Reference
from tests.waiting import until

TRACE, SPAN = "ab" * 16, "cd" * 8
TRACEPARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    with collecting(tmp_path_factory.mktemp("otlp") / "otlp.jsonl") as collector:
        yield collector


@pytest.fixture(scope="module")
def server(
    ray_address: str, deepseek: tuple[Path, Any], collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("doors")
    telemetry = {"otlp_endpoint": collector.endpoint, "trace_ratio": 0, "log_format": "json"}
    doors = {"port": 0, "http_port": 0}
    file = server_file(folder, ray_address, deepseek[0], gateway=doors, telemetry=telemetry)
    with serving("--config", str(file)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_http_gives_what_transformers_gives(client: openai.OpenAI, wanted: list[Reference]) -> None:
    model = client.models.list().data[0].id
    for prompt, reference in zip(PROMPTS, wanted, strict=True):
        extra = {"ignore_eos": True}
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=COUNT, temperature=0, extra_body=extra, extra_headers=TRACEPARENT
        )
        stream = client.completions.create(
            model=model, prompt=prompt, max_tokens=COUNT, temperature=0, extra_body=extra, stream=True
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == COUNT == len(reference.tokens)
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_one_connected_trace_over_all_processes(collector: Collector, client: openai.OpenAI) -> None:
    """Of the requests above that carried it, with a router and experts on another node than their attention shard."""

    def spans() -> dict[str, dict[str, Any]]:
        return {span["spanId"]: span for span in collector.spans if span["traceId"] == TRACE}

    until(lambda: {"gateway-0", "attention-0", "router-0", "expert-0", "expert-1"} <= actors(spans()))
    until(lambda: all(span["parentSpanId"] in {SPAN, *spans()} for span in spans().values()))
    found = spans()
    parents = {
        (found[s["parentSpanId"]]["name"].split()[0], s["name"]) for s in found.values() if s["parentSpanId"] != SPAN
    }
    assert {("text_completion", "queue"), ("text_completion", "prefill"), ("text_completion", "decode")} <= parents
    assert {("decode", "step"), ("step", "dispatch"), ("dispatch", "experts")} <= parents


def actors(spans: dict[str, dict[str, Any]]) -> set[str]:
    return {span["actor"] for span in spans.values()}


def test_a_scrape_tells_of_every_shard(server: Serving, client: openai.OpenAI) -> None:
    text = httpx.get(f"http://{server.http}/metrics", timeout=30).raise_for_status().text
    rows = {
        sample.labels["shard"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "expertmesh_expert_rows_total"
    }
    assert rows.keys() == {"expert-0", "expert-1"}
    assert all(value > 0 for value in rows.values())


def test_a_batch(server: Serving, client: openai.OpenAI, tmp_path: Path) -> None:
    rows, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": client.models.list().data[0].id, "prompt": PROMPTS[1], "max_tokens": 4, "temperature": 0}
    lines = [{"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body} for n in range(20)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("batch", "run", str(rows), "-o", str(out), "--target", server.address)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(line["custom_id"] for line in lines)
    assert len({answer["response"]["body"]["choices"][0]["text"] for answer in answers}) == 1
