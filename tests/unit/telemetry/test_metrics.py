"""What a scrape gets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import TelemetryConfig
from cluster.telemetry.figures import METRICS
from cluster.telemetry.metrics import GatewayMetrics
from tests.otlp_collector import collecting
from tests.unit.telemetry.controllers import Controller, view
from tests.waiting import until


class Slow(Controller):
    """Its answer takes more than a second, as it does while some actor hangs."""

    def begin(self, method: str, *args: Any) -> Future[Any]:
        """See ActorHandle."""
        found, answer = super().begin(method, *args), Future[Any]()
        timer = threading.Timer(1.5, lambda: answer.set_result(found.result()))
        timer.daemon = True
        timer.start()
        return answer


@pytest.fixture
def controller() -> Controller:
    """It answers."""
    return Controller(view(expert_map_epoch=3))


@pytest.fixture
def metrics(controller: Controller) -> Iterator[GatewayMetrics]:
    """Those of a gateway with two streams."""
    made = GatewayMetrics(TelemetryConfig(), "gateway-0", controller, lambda: 2, lambda: 5)
    yield made
    made.close()


def scraped(metrics: GatewayMetrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples of each name, by the values of their labels."""
    samples: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return samples


def test_gateway_and_cluster_are_in_one_exposition(metrics: GatewayMetrics) -> None:
    samples = scraped(metrics)

    assert samples["expertmesh_streams_open"] == {(): 2}
    assert samples["expertmesh_replays_total"] == {(): 5}
    assert samples["expertmesh_controller_up"] == {(): 1}
    assert samples["expertmesh_expert_map_epoch"] == {(): 3}
    assert samples["expertmesh_expert_rows_total"] == {("expert-0",): 30}


def test_without_the_controller_its_series_are_absent(metrics: GatewayMetrics, controller: Controller) -> None:
    controller.view = None
    samples = scraped(metrics)

    assert samples["expertmesh_controller_up"] == {(): 0}
    assert samples["expertmesh_streams_open"] == {(): 2}
    ours = {metric.name.replace(".", "_") for metric in METRICS}
    assert not [name for name in samples if name.removesuffix("_total") in ours]


def test_one_scrape_asks_the_controller_once(metrics: GatewayMetrics, controller: Controller) -> None:
    metrics.exposition()
    metrics.exposition()
    assert controller.asked == 1


def test_two_gateways_of_a_process_do_not_mix(metrics: GatewayMetrics) -> None:
    other = GatewayMetrics(TelemetryConfig(), "gateway-1", Controller(None), lambda: 9, lambda: 0)
    other.requests.prompt_tokens.add(7)
    try:
        assert scraped(other)["expertmesh_prompt_tokens_total"] == {(): 7}
        assert "expertmesh_prompt_tokens_total" not in scraped(metrics)
        assert scraped(metrics)["expertmesh_streams_open"] == {(): 2}
    finally:
        other.close()


def test_metrics_are_exported_while_an_actor_hangs(tmp_path: Path) -> None:
    with collecting(tmp_path / "otlp.jsonl") as collector:
        # longer than figures are fresh: each export waits for the answer
        config = TelemetryConfig(otlp_endpoint=collector.endpoint, metrics_interval_s=1.2)
        metrics = GatewayMetrics(config, "gateway-0", Slow(view()), lambda: 2, lambda: 0)
        try:
            until(lambda: "expertmesh.expert.rows" in collector.text)
        finally:
            metrics.close()
