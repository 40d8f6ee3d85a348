"""The HTTP doors of a gateway: uvicorn in the gateway's event loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from cluster.config import TlsConfig
from cluster.gateway.settings import PortInUse, host_port
from cluster.tls import server_pem

_CLOSE_S = 1


class HttpDoor:
    """One ASGI application at one address."""

    def __init__(self, app: ASGIApp, host: str, port: int, tls: TlsConfig | None) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._app = app
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def open(self) -> str:
        """Let clients in. Returns "HOST:PORT"; raises PortInUse, ConfigError."""
        listener = _listen(self._host, self._port)
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_S,
            **_tls_options(self._tls),
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        return host_port(self._host, listener.getsockname()[1])

    async def close(self) -> None:
        """End what still runs. Idempotent."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise PortInUse(host, port) from error
    return listener


def _tls_options(tls: TlsConfig | None) -> dict[str, Any]:
    if tls is None:
        return {}
    server_pem(tls)  # to tell what is wrong with the files
    options: dict[str, Any] = {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
    if tls.client_ca is not None:
        options |= {"ssl_ca_certs": str(tls.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options
