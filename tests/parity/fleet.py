"""A router and three expert shards in processes of their own, for one model after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from actors.expert import ExpertShard
from actors.model.families import load_spec
from actors.moe_client import MoEClient
from actors.router import Router
from actors.settings import ModelSettings
from actors.transport.base import Address, Wire
from actors.transport.endpoint import Endpoint
from placement.expert_map import single_replica_map
from tests.multiprocess.peers import Peer

SHARDS = ("expert-0", "expert-1", "expert-2")
PATIENCE_S = 60.0
_ROLES = {"router": Router, "expert": ExpertShard}
_SECRET = b"a secret of the parity runs"
_NODE = "node-0"


def host(pipe: Connection) -> None:
    """In a process of its own: becomes the actor it is told to be, calls its methods, stops it, becomes the next."""
    torch.set_num_threads(1)
    actor: Any = None
    while (message := pipe.recv()) is not None:
        method, args = message
        try:
            if method == "become":
                role, name, settings = args
                actor = _ROLES[role](name, settings, lambda name, on_wire: _endpoint(name, on_wire))
                pipe.send(None)
            else:
                pipe.send(getattr(actor, method)(*args) if actor is not None else None)
        except Exception as error:  # it is the caller's
            pipe.send(error)
        if method == "stop":
            actor = None


def _endpoint(name: str, on_wire: Any = None) -> Endpoint:
    return Endpoint(name, _NODE, _SECRET, on_wire=on_wire)


class ExpertFleet:
    """One router and three expert shards."""

    def __init__(self, hosts: dict[str, Peer]) -> None:
        self._hosts = hosts

    @contextmanager
    def serving(self, path: Path, dtype: torch.dtype, row_block: int = 0) -> Iterator[MoEClient]:
        """The routed experts of the checkpoint at ``path``, over shared memory."""
        spec = load_spec(path)
        settings = ModelSettings(path, str(dtype).removeprefix("torch."), row_block, 1, PATIENCE_S)
        expert_map = single_replica_map(1, spec.moe_layers, spec.moe.n_experts, SHARDS)
        addresses: dict[str, Address] = {}
        try:
            for name in SHARDS:
                self._call(name, "become", "expert", name, settings)
                addresses[name] = self._call(name, "listen")
                self._call(name, "load", 1, expert_map.held_by(name))
            self._call("router-0", "become", "router", "router-0", settings)
            address = self._call("router-0", "load")
            self._call("router-0", "prepare", expert_map, addresses, None, PATIENCE_S)
            self._call("router-0", "commit", 1, PATIENCE_S)
            with _connected(address) as wire:
                yield MoEClient(wire, dtype, torch.device("cpu"), spec.d_model, PATIENCE_S, spec.moe_layers)
        finally:
            for name in self._hosts:
                self._call(name, "stop")

    def check_all_were_asked(self) -> None:
        """Raise AssertionError unless every shard has computed rows of the model being served."""
        rows = {name: self._call(name, "stats").rows for name in SHARDS}
        assert all(rows.values()), f"a shard has computed nothing: {rows}"

    def _call(self, name: str, method: str, *args: Any) -> Any:
        self._hosts[name].send((method, args))
        answer = self._hosts[name].recv(PATIENCE_S)
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def _connected(address: Address) -> Iterator[Wire]:
    endpoint = _endpoint("attention-0")
    wire = endpoint.connect(address, time.monotonic() + PATIENCE_S)
    try:
        yield wire
    finally:
        wire.close()
        endpoint.close()


@contextmanager
def expert_fleet() -> Iterator[ExpertFleet]:
    """Its processes are ended whatever happens."""
    with ExitStack() as stack:
        names = ("router-0", *SHARDS)
        yield ExpertFleet({name: stack.enter_context(Peer("tests.parity.fleet:host")) for name in names})
