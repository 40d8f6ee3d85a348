"""A cluster in this process, with its controller at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from cluster.config import ServerConfig
from cluster.controller import Controller
from cluster.launch import _local_controller
from tests.serving import Client


@contextmanager
def running(config: ServerConfig) -> Iterator[tuple[Client, Controller]]:
    """A local cluster, its client and its controller."""
    with _local_controller(config) as handle, Client(handle.call("start", handle, timeout_s=60).grpc) as client:
        assert isinstance(handle.actor, Controller)
        yield client, handle.actor


def names(client: Client, role: int) -> list[str]:
    """The actors of a role."""
    return [actor.name for actor in client.load(role)]


def crash(controller: Controller, name: str) -> None:
    """Let an actor end by itself, as by kill -9."""
    member = controller._roster.find(name)
    assert member is not None
    member.handle.end()  # type: ignore[attr-defined]


def answers(client: Client) -> bool:
    """True if a request is served now."""
    try:
        return len(client.tokens([3, 5, 7], 4)) == 4
    except grpc.RpcError:
        return False
