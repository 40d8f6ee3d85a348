"""Sockets on which a door hears."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

from cluster.config import ConfigError
from cluster.gateway.settings import PortInUse

_BACKLOG = 1024
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""A client whose machine is gone is noticed after two minutes, whether or not anything is sent to it."""
_NOT_OF_THIS_MACHINE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


async def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that take connections from now on, though nobody answers yet: one for each address of ``host`` that this
    machine has, all at the same port; 0 takes a free one.

    Raises ConfigError for a host that means no address, and PortInUse.
    """
    listeners: list[socket.socket] = []
    try:
        for family, address in await _addresses(host):
            port = listeners[0].getsockname()[1] if listeners else port
            listeners += _bound(family, (address[0], port, *address[2:]))
        if not listeners:
            raise OSError(errno.EADDRNOTAVAIL, "this machine does not have that address")
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise PortInUse(host, port) from error
    return listeners


async def _addresses(host: str) -> list[tuple[int, Any]]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"gateway.host is {host!r}: {error}; allowed is an address or name of this machine") from None
    return [(family, address) for family, _, _, _, address in dict.fromkeys(found)]


def _bound(family: int, address: Any) -> list[socket.socket]:
    """None if this machine does not have the address, as IPv6's of localhost where it is off."""
    listener: socket.socket | None = None
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            listener.setsockopt(socket.IPPROTO_TCP, option, value)  # its connections inherit them
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno in _NOT_OF_THIS_MACHINE:
            return []
        raise
    return [listener]
