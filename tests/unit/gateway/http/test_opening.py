"""How an HTTP door opens, and what keeps it from it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from cluster.config import ConfigError
from cluster.gateway.http import listener
from cluster.gateway.http.api import metrics_api
from cluster.gateway.http.door import HttpDoor
from cluster.gateway.http.watched import Watched
from cluster.gateway.settings import PortInUse
from tests.unit.gateway.http.raw_http import served


def metrics_door(host: str, port: int = 0) -> HttpDoor:
    return HttpDoor(metrics_api(Watched(lambda: True, bytes)), host, port, None, asyncio.Event())


async def test_a_host_that_is_none_is_told() -> None:
    for host in ("no-such-host.invalid", "a..b"):
        door = metrics_door(host)
        with pytest.raises(ConfigError, match=f"gateway.host is '{host}'"):
            await door.open()
        await door.close()


async def test_all_addresses_of_a_name_are_listened_at(monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(*_: Any, **__: Any) -> list[Any]:
        tcp = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*tcp, (address, 0)) for address in ("192.0.2.1", "127.0.0.1", "127.0.0.2")]  # the first is not ours

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two)
    door = metrics_door("somewhere")
    port = int((await door.open()).removeprefix("somewhere:"))
    try:
        for address in ("127.0.0.1", "127.0.0.2"):
            with socket.create_connection((address, port), timeout=10):
                pass
        taken = metrics_door("somewhere", port)
        with pytest.raises(PortInUse):
            await taken.open()
    finally:
        await door.close()


async def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(PortInUse):
        await metrics_door("192.0.2.1").open()


async def test_what_keeps_a_door_from_opening_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise OSError("no more sockets")

    opened: list[socket.socket] = []
    honest = listener.listen

    async def noted(host: str, port: int) -> list[socket.socket]:
        opened.extend(await honest(host, port))
        return opened

    monkeypatch.setattr("cluster.gateway.http.door.listen", noted)
    monkeypatch.setattr(asyncio.get_running_loop(), "create_server", fail)
    door = metrics_door("127.0.0.1")
    with pytest.raises(OSError, match="no more sockets"):
        await door.open()
    await door.close()
    assert [one.fileno() for one in opened] == [-1]


async def test_an_open_door_accepts() -> None:
    door = metrics_door("127.0.0.1")
    await door.open()
    assert door._server is not None
    assert door._server.started
    await door.close()


async def test_a_port_in_use_is_told() -> None:
    async with served() as (_, _, port):
        door = metrics_door("127.0.0.1", port)
        with pytest.raises(PortInUse):
            await door.open()
        await door.close()
