"""Nodes on one machine: network namespaces with an address each, joined by a bridge in one more."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_FOLDER = Path("/var/run/netns")


class NoNamespaces(Exception):
    """This environment does not allow them; the text is what it said."""


class Network:
    """The nodes of :func:`joined`. The test's own namespace has no part in it."""

    def __init__(self, switch: str, nodes: tuple[str, ...]) -> None:
        self._switch = switch
        self.nodes = nodes

    def host(self, node: str) -> str:
        """The node's address."""
        return f"10.77.0.{1 + self.nodes.index(node)}"

    def cut(self, node: str) -> None:
        """Nothing gets to the node or away from it; neither end of a connection is told."""
        _ip("-n", self._switch, "link", "set", _port(self, node), "down")

    def heal(self, node: str) -> None:
        """Undo ``cut``."""
        _ip("-n", self._switch, "link", "set", _port(self, node), "up")


@contextmanager
def joined(count: int, name: str = "net") -> Iterator[Network]:
    """``count`` nodes that reach each other; ``name`` tells the networks of a process apart. Errors: NoNamespaces.

    Whatever was made is gone at the end, also where making it failed: a namespace takes its links with it.
    """
    prefix = f"expertmesh-{os.getpid()}-{name}"
    network = Network(f"{prefix}-switch", tuple(f"{prefix}-node{n}" for n in range(count)))
    with ExitStack() as stack:
        for namespace in (network._switch, *network.nodes):
            _ip("netns", "add", namespace)
            stack.callback(_ip, "netns", "del", namespace)
        _ip("-n", network._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", network._switch, "link", "set", "bridge", "up")
        for node in network.nodes:
            _plug_in(network, node)
        yield network


def enter(node: str) -> None:
    """Move this thread, and those that it starts from now on, to the node. Errors: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(_FOLDER / node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"setns to {node}: {os.strerror(number)}")
    finally:
        os.close(fd)


def _plug_in(network: Network, node: str) -> None:
    switch, port = network._switch, _port(network, node)
    _ip("link", "add", port, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", node)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", node, "address", "add", f"{network.host(node)}/24", "dev", "eth0")
    for link in ("lo", "eth0"):
        _ip("-n", node, "link", "set", link, "up")


def _port(network: Network, node: str) -> str:
    return f"port{network.nodes.index(node)}"


def _ip(*arguments: str) -> None:
    command = " ".join(("ip", *arguments))
    try:
        done = subprocess.run(("ip", *arguments), capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        raise NoNamespaces("there is no `ip` command (iproute2)") from None
    if done.returncode:
        raise NoNamespaces(f"`{command}`: {done.stderr.strip()}")
