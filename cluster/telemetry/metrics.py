"""All metrics of a gateway: for whoever scrapes, and over OTLP if a collector is configured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider, ObservableCounter, ObservableGauge
from opentelemetry.sdk.metrics.export import CardinalityLimits, MetricReader, PeriodicExportingMetricReader
from prometheus_client import CollectorRegistry, generate_latest

from cluster.config import TelemetryConfig
from cluster.fleet import ActorHandle
from cluster.telemetry.figures import METRICS
from cluster.telemetry.look import ClusterLook
from cluster.telemetry.otlp import metric_exporter, resource
from cluster.telemetry.request_metrics import RequestMetrics

_END_MS = 1000
_COLLECT_MS = 15_000
"""For looking at the cluster, which takes seconds while an actor hangs, perhaps after a scrape that does the same."""
_SHARDS_EVER = 20_000
"""Points that a metric of the data plane may ever have: the SDK counts shards that are long gone too."""

_Callback = Callable[[CallbackOptions], Iterable[Observation]]


class GatewayMetrics:
    """Instruments of one gateway, with a provider of their own: two gateways of a process do not mix.

    ``streams`` and ``replays`` tell how many are open, and how often one was taken over.
    """

    def __init__(
        self,
        config: TelemetryConfig,
        gateway: str,
        controller: ActorHandle,
        streams: Callable[[], int],
        replays: Callable[[], int],
    ) -> None:
        self._look = ClusterLook(controller)
        self._registry = CollectorRegistry()
        self._scraping = threading.Lock()
        limits = CardinalityLimits({ObservableCounter: _SHARDS_EVER, ObservableGauge: _SHARDS_EVER})
        readers: list[MetricReader] = [
            PrometheusMetricReader(
                disable_target_info=True, scope_info_enabled=False, registry=self._registry, cardinality_limits=limits
            )
        ]
        if config.otlp_endpoint:
            interval_ms = config.metrics_interval_s * 1000
            exporter = metric_exporter(config)
            readers.append(PeriodicExportingMetricReader(exporter, interval_ms, _COLLECT_MS, cardinality_limits=limits))
        self._provider = MeterProvider(
            readers,
            resource=resource(gateway),
            # no span is ever the current one here, so that there would be none; looking for it takes time
            exemplar_filter=AlwaysOffExemplarFilter(),
            shutdown_on_exit=False,
        )
        meter = self._provider.get_meter("expertmesh.gateway")
        self.requests = RequestMetrics(meter)
        _observe_gateway(meter, streams, replays)
        self._observe_cluster(meter)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format. Waits for the controller: not for the event loop."""
        with self._scraping:  # the reader hands what it collects to whichever scrape comes first
            return generate_latest(self._registry)

    def close(self) -> None:
        """Send what there is over OTLP, within about a second. Once."""
        self._look.close()
        self._provider.shutdown(_END_MS)

    def _observe_cluster(self, meter: Meter) -> None:
        def up(_: CallbackOptions) -> list[Observation]:
            # once it is closed nobody knows
            return [] if self._look.closed else [Observation(int(self._look.now() is not None))]

        meter.create_observable_gauge("expertmesh.controller.up", [up], "", "1 while the controller answers.")
        for metric in METRICS:
            counting = metric.kind == "counter"
            create = meter.create_observable_counter if counting else meter.create_observable_gauge
            create(metric.name, [self._points(metric.name)], metric.unit, metric.meaning)

    def _points(self, name: str) -> _Callback:
        def points(_: CallbackOptions) -> list[Observation]:
            figures = self._look.now() or {}
            return [Observation(value, labels) for value, labels in figures.get(name, ())]

        return points


def _observe_gateway(meter: Meter, streams: Callable[[], int], replays: Callable[[], int]) -> None:
    meter.create_observable_gauge(
        "expertmesh.streams.open", [lambda _: [Observation(streams())]], "{stream}", "Streams that are open now."
    )
    meter.create_observable_counter(
        "expertmesh.replays",
        [lambda _: [Observation(replays())]],
        "{replay}",
        "Streams that another attention shard took over, or the same one after a fault.",
    )
