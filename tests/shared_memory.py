"""Endpoints of one node, in one process: their wires are shared memory, where common frames are express."""

from __future__ import annotations

from collections.abc import Callable

from actors.transport.base import Wire
from actors.transport.endpoint import Endpoint


def shm_endpoint(name: str, on_wire: Callable[[Wire], None] | None = None, ring_bytes: int = 1 << 20) -> Endpoint:
    """An ``EndpointFactory``."""
    return Endpoint(name, "here", b"a secret of the tests", on_wire=on_wire, ring_bytes=ring_bytes)
