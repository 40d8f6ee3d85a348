"""The HTTP doors of a gateway: uvicorn in the gateway's event loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from cluster.config import TlsConfig
from cluster.gateway.http.protocol import HttpProtocol
from cluster.gateway.settings import PortInUse, host_port
from cluster.tls import server_pem

_CLOSE_S = 1
_BACKLOG = 1024
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""A client whose machine is gone is noticed after two minutes, whether or not anything is sent to it."""


class HttpDoor:
    """One ASGI application at one address. ``closing`` is set when the door begins to close, for the application."""

    def __init__(self, app: ASGIApp, host: str, port: int, tls: TlsConfig | None, closing: asyncio.Event) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._app = app
        self._closing = closing
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def open(self) -> str:
        """Let clients in. Returns "HOST:PORT"; raises PortInUse, ConfigError."""
        config = uvicorn.Config(
            self._app,
            http=HttpProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=2 * _CLOSE_S,
            **_tls_options(self._tls),
        )
        config.load()
        listener = _listen(self._host, self._port)
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        return host_port(self._host, listener.getsockname()[1])

    async def close(self) -> None:
        """End what still runs: what has not ended within a second is cut off. Idempotent."""
        if self._server is None or self._serving is None:
            return
        self._closing.set()
        self._server.should_exit = True
        await asyncio.wait({self._serving}, timeout=_CLOSE_S)
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        await self._serving


class _Server(uvicorn.Server):
    """Leaves signals to the process it lives in."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on, though nobody answers yet."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        listener.setsockopt(socket.IPPROTO_TCP, option, value)  # its connections inherit them
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
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
