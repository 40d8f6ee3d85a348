"""A gateway that takes the place of one that died."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from expertmesh.v1 import control_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import ServerConfig
from cluster.gateway.http.door import HttpDoor
from cluster.gateway.settings import PortInUse
from tests.local_cluster import answers, crash, names, running
from tests.waiting import until

Local = Callable[..., ServerConfig]


def test_a_gateway_that_dies_is_replaced_at_its_addresses(checkpoint: tuple[Path, Any], local: Local) -> None:
    every_door = {"gateway.health_port": 0, "gateway.metrics_port": 0}
    with running(local(checkpoint[0], **every_door)) as (client, controller):
        assert len(client.tokens([3, 5, 7], 4)) == 4
        doors = controller._gateways._doors
        assert doors is not None
        crash(controller, "gateway-0")
        until(lambda: answers(client))
        assert names(client, pb.ROLE_GATEWAY) == ["gateway-1"]
        until(lambda: reached(doors.http) and reached(doors.metrics))
        (gateway,) = client.load(pb.ROLE_GATEWAY)
        assert (gateway.gateway.address, gateway.gateway.http_address) == (doors.grpc, doors.http)
        assert httpx.get(f"http://{doors.http}/v1/models", timeout=30).json()["data"]
        assert httpx.get(f"http://{doors.metrics}/health", timeout=30).json() == {"status": "ok"}
        with grpc.insecure_channel(doors.health) as channel:
            request = health_pb2.HealthCheckRequest(service="expertmesh.v1.Inference")
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_door_that_somebody_else_has_taken_keeps_no_successor_away(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def taken(door: HttpDoor) -> str:
        raise PortInUse("127.0.0.1", 1)

    with running(local(checkpoint[0])) as (client, controller):
        doors = controller._gateways._doors
        assert doors is not None
        monkeypatch.setattr(HttpDoor, "open", taken)
        crash(controller, "gateway-0")
        until(lambda: answers(client))
        (gateway,) = client.load(pb.ROLE_GATEWAY)
        assert (gateway.gateway.address, gateway.gateway.http_address) == (doors.grpc, "")


def reached(address: str) -> bool:
    host, port = address.split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
