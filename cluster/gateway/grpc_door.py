"""The gRPC doors of a gateway: the services, and one more for probes that knows health alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
from expertmesh.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.config import TlsConfig
from cluster.fleet import ActorHandle
from cluster.gateway.auth import Doorkeeper
from cluster.gateway.control import ControlService
from cluster.gateway.inference import Inference
from cluster.gateway.service import InferenceService
from cluster.gateway.settings import GatewaySettings, PortInUse, host_port
from cluster.gateway.wellformed import WellFormed
from cluster.tls import server_pem

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name

_CLOSE_S = 0.5


class Health:
    """The standard health service: "" and Control are live while there is a gateway, Inference is ready while steps can
    be computed. Shared by the doors that offer it."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self._task: asyncio.Task[None] | None = None

    async def start(self, ready: Callable[[], bool], changed: Callable[[bool], Awaitable[None]]) -> None:
        """Follow ``ready``, of which ``changed(known)`` returns when it is not ``known`` any more."""
        self._task = asyncio.create_task(self._follow(ready, changed))

    async def stop(self) -> None:
        """Not serving, for good."""
        if self._task is not None:
            self._task.cancel()
        await self.servicer.enter_graceful_shutdown()

    async def _follow(self, ready: Callable[[], bool], changed: Callable[[bool], Awaitable[None]]) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        await self.servicer.set("", serving)
        await self.servicer.set(CONTROL, serving)
        while True:
            now = ready()
            await self.servicer.set(INFERENCE, serving if now else health_pb2.HealthCheckResponse.NOT_SERVING)
            await changed(now)


class GrpcDoor:
    """Inference, Control, health and reflection, with TLS and tokens if they are configured."""

    def __init__(
        self, inference: Inference, controller: ActorHandle, health: Health, settings: GatewaySettings
    ) -> None:
        self._settings = settings
        self._server = grpc.aio.server(
            interceptors=[Doorkeeper(settings.access), WellFormed()], options=_server_options(settings.max_message)
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(inference), self._server)
        self._control = ControlService(controller)
        control_pb2_grpc.add_ControlServicer_to_server(self._control, self._server)
        _offer_health(health, self._server, (INFERENCE, CONTROL) if settings.reflection else None)

    async def open(self) -> str:
        """Let clients in. Returns "HOST:PORT"; raises PortInUse, ConfigError."""
        settings = self._settings
        credentials = _server_credentials(settings.tls) if settings.tls is not None else None
        port = _add_port(self._server, settings.host, settings.port, credentials)
        await self._server.start()
        return host_port(settings.host, port)

    async def close(self) -> None:
        """End what still runs. Idempotent."""
        await self._server.stop(_CLOSE_S)
        self._control.close()


class HealthDoor:
    """Health in plaintext and without tokens: it tells nothing but that."""

    def __init__(self, health: Health, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        _offer_health(health, self._server, None)

    async def open(self) -> str:
        """Let probes in. Returns "HOST:PORT"; raises PortInUse."""
        port = _add_port(self._server, self._host, self._port, None)
        await self._server.start()
        return host_port(self._host, port)

    async def close(self) -> None:
        """End it. Idempotent."""
        await self._server.stop(_CLOSE_S)


def _offer_health(health_: Health, server: grpc.aio.Server, reflected: tuple[str, ...] | None) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(health_.servicer, server)
    if reflected is not None:
        names = (*reflected, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)


def _add_port(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    address = host_port(host, port)
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise PortInUse(host, port) from error


def _server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """With ``client_ca`` every client must show a certificate."""
    pem = server_pem(tls)
    mutual = pem.client_ca is not None
    return grpc.ssl_server_credentials([(pem.key, pem.certificate)], pem.client_ca, require_client_auth=mutual)


def _server_options(max_message: int) -> list[tuple[str, int]]:
    """Finite messages, a port of our own, and patience with clients that ping every ten seconds."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message),
        ("grpc.max_send_message_length", max_message),
        ("grpc.http2.min_ping_interval_without_data_ms", 9_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_age_ms", 2 * 3600 * 1000),
        ("grpc.max_connection_age_grace_ms", 600 * 1000),
    ]
