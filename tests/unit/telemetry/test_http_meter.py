"""What is noted of requests over HTTP, and that nothing of it is a client's choice."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cluster.config import TelemetryConfig
from cluster.telemetry.http_meter import HttpMeter
from cluster.telemetry.metrics import GatewayMetrics
from tests.unit.telemetry.controllers import Controller


async def _health(request: Request) -> Response:
    return PlainTextResponse("ok")


async def _broken(request: Request) -> Response:
    raise RuntimeError("of the application")


@pytest.fixture
def metrics() -> Iterator[GatewayMetrics]:
    """Of a gateway without a controller."""
    made = GatewayMetrics(TelemetryConfig(), "gateway-0", Controller(None), lambda: 0, lambda: 0)
    yield made
    made.close()


@pytest.fixture
def client(metrics: GatewayMetrics) -> httpx.AsyncClient:
    """A client of a small application."""
    app = Starlette(routes=[Route("/health", _health), Route("/metrics", _broken)])
    transport = httpx.ASGITransport(HttpMeter(app, metrics.requests.http), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def counts(metrics: GatewayMetrics) -> dict[tuple[str, str, str], float]:
    """Requests by method, route and status."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (s.labels["http_request_method"], s.labels["http_route"], s.labels["http_response_status_code"]): s.value
        for family in families
        for s in family.samples
        if s.name == "http_server_request_duration_seconds_count"
    }


async def test_a_status_is_one_label_value_whatever_its_type(metrics: GatewayMetrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": HTTPStatus.OK if scope["query_string"] else 200})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(HttpMeter(app, metrics.requests.http))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/health", "/health?x", "/health"):
            await client.get(path)
    lines = [line for line in metrics.exposition().decode().splitlines() if "duration_seconds_count" in line]
    assert [line.rpartition(" ")[2] for line in lines if line.startswith("http_server")] == ["3.0"]


async def test_requests_are_counted_by_route_and_status(metrics: GatewayMetrics, client: httpx.AsyncClient) -> None:
    async with client:
        for _ in range(2):
            assert (await client.get("/health")).text == "ok"
        await client.get("/metrics")
        await client.request("BREW", "/health")
        for number in range(50):
            await client.get(f"/nothing/{number}")
            await client.get(f"/v1/models/{number}")

    assert counts(metrics) == {
        ("GET", "/health", "200"): 2,
        ("GET", "/metrics", "500"): 1,
        ("_OTHER", "/health", "405"): 1,
        ("GET", "_OTHER", "404"): 50,
        ("GET", "/v1/models/{name}", "404"): 50,
    }
