"""The page for operators says what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ServerConfig, TelemetryConfig
from cluster.telemetry.figures import METRICS
from tests.unit.telemetry.test_request import Gateway

PAGE = (Path(__file__).parents[3] / "docs" / "telemetry.md").read_text(encoding="utf-8")
UNITS = {"s": "_seconds", "By": "_bytes"}


def examples() -> list[Any]:
    """Its YAML blocks, parsed."""
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


def test_every_metric_is_on_the_page_and_no_other() -> None:
    gateway = Gateway()
    gateway.serve(gateway.begin(), 2)
    gateway.metrics.requests.http.record(1.0)
    families = text_string_to_metric_families(gateway.metrics.exposition().decode())
    gateway.metrics.close()
    gateway.provider.shutdown()
    there = {f"{family.name}{'_total' if family.type == 'counter' else ''}" for family in families}
    for metric in METRICS:
        total = "_total" if metric.kind == "counter" else ""
        there.add(metric.name.replace(".", "_") + UNITS.get(metric.unit, "") + total)

    told = {
        name
        for line in PAGE.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    spans = {"queue", "prefill", "decode", "step", "dispatch", "experts"}
    assert told - spans == there


def test_the_configuration_shown_is_the_default_one() -> None:
    config = ServerConfig.model_validate(examples()[0])
    assert config.telemetry == TelemetryConfig()
    assert config.gateway.metrics_port == 9464


def test_the_examples_for_other_programs_hold_together() -> None:
    prometheus, collector = examples()[1:]
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["gateway.example:9464"]
    for pipeline in collector["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= collector[kind].keys()
