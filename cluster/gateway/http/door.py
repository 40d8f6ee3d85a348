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
from cluster.gateway.http.listener import listen
from cluster.gateway.http.protocol import HttpProtocol
from cluster.gateway.settings import host_port
from cluster.tls import server_pem

_CLOSE_S = 1
_KEEP_ALIVE_S = 75
"""An idle connection lives so long: longer than load balancers keep theirs, else they send into one that ends."""


class HttpDoor:
    """One ASGI application at one address. ``closing`` is set when the door begins to close, for the application."""

    def __init__(self, app: ASGIApp, host: str, port: int, tls: TlsConfig | None, closing: asyncio.Event) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._app = app
        self._closing = closing
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def open(self) -> str:
        """Let clients in; they are answered from now on. Returns "HOST:PORT"; raises PortInUse, ConfigError."""
        config = uvicorn.Config(
            self._app,
            http=HttpProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=2 * _CLOSE_S,
            **_tls_options(self._tls),
        )
        config.load()
        listeners = await listen(self._host, self._port)
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=listeners))
        up = asyncio.create_task(server.up.wait())
        await asyncio.wait((serving, up), return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if not server.up.is_set():
            for listener in listeners:
                listener.close()
            serving.result()  # raises what kept it from coming up
        self._server, self._serving = server, serving
        return host_port(self._host, listeners[0].getsockname()[1])

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
    """Says when it is up, and leaves signals to the process it lives in."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _tls_options(tls: TlsConfig | None) -> dict[str, Any]:
    if tls is None:
        return {}
    server_pem(tls)  # to tell what is wrong with the files
    options: dict[str, Any] = {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
    if tls.client_ca is not None:
        options |= {"ssl_ca_certs": str(tls.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options
