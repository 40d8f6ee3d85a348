"""Actors of a two-node run: each in a process that lives on its node of :mod:`tests.multiprocess.namespaces`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actors.expert import ExpertShard
from actors.model.families import load_spec
from actors.moe_client import MoEClient, MoEUnavailable
from actors.router import Router
from actors.settings import ModelSettings
from actors.transport.base import Address, Wire
from actors.transport.endpoint import Endpoint
from placement.expert_map import single_replica_map
from tests.multiprocess.namespaces import Network, enter
from tests.multiprocess.peers import Peer
from tests.paged_runner import PagedRunner

STEP_TIMEOUT_S = 2.0
SHARDS = ("expert-0", "expert-1")
ROW_BLOCK = 8
_PATIENCE_S = 60.0
_SECRET = b"a secret of the two nodes"
_ROLES = {"router": Router, "expert": ExpertShard}


class Place(NamedTuple):
    """Where an actor lives: the namespace, whose name is the node's id, and its address."""

    node: str
    host: str

    def endpoint(self, name: str, on_wire: Callable[[Wire], None] | None = None) -> Endpoint:
        """Of a process that has entered the node."""
        return Endpoint(name, self.node, _SECRET, self.host, on_wire=on_wire)


class Said(NamedTuple):
    """What an attention shard answers: ``tokens`` so far, and the error that ended it early, after ``seconds``."""

    tokens: list[int]
    error: str
    seconds: float


def serve_actor(pipe: Connection, place: Place, role: str, name: str, settings: ModelSettings) -> None:
    """In a process: an actor whose methods are called until None comes; it answers (result, None) or (None, error)."""
    enter(place.node)
    torch.set_num_threads(1)
    actor: Any = _ROLES[role](name, settings, place.endpoint)
    while (message := pipe.recv()) is not None:
        method, args = message
        try:
            pipe.send((getattr(actor, method)(*args), None))
        except Exception as error:  # it is the caller's
            pipe.send((None, error))
    actor.stop()


def serve_attention(pipe: Connection, place: Place, router: Address, path: Path, prompt: list[int]) -> None:
    """In a process: computes a stream over the router, so many more tokens each time a number comes, until None."""
    enter(place.node)
    torch.set_num_threads(1)
    endpoint = place.endpoint("attention-0")
    wire = endpoint.connect(router, time.monotonic() + _PATIENCE_S)
    runner = PagedRunner(path, row_block=ROW_BLOCK)
    spec = runner.spec
    # Longer than the router's: it is the router that tells which shard did not answer.
    client = MoEClient(wire, torch.float32, torch.device("cpu"), spec.d_model, 3 * STEP_TIMEOUT_S, spec.moe_layers)
    runner.moe = client
    del runner.bank, runner.gate
    stream = runner.add(prompt)
    while (count := pipe.recv()) is not None:
        pipe.send(_grown(runner, client, stream, count))
    wire.close()
    endpoint.close()


def _grown(runner: PagedRunner, client: MoEClient, stream: int, count: int) -> Said:
    """A step that fails is void: the next begins where it began."""
    tokens, began = runner.tokens[stream], time.monotonic()
    error = ""
    for _ in range(count):
        done = runner._computed[stream]
        client.begin_step()
        try:
            (logits,) = runner.step([(stream, len(tokens) - done)])
        except MoEUnavailable as failure:
            client.abandon()
            runner._computed[stream] = done
            error = f"{type(failure).__name__}: {failure}"
            break
        tokens.append(int(logits[-1].argmax()))
    return Said(list(tokens), error, time.monotonic() - began)


class Cluster:
    """Attention shard and router on the network's first node, expert shards on the second."""

    def __init__(self, network: Network, path: Path, prompt: list[int]) -> None:
        near, far = (Place(node, network.host(node)) for node in network.nodes)
        spec = load_spec(path)
        settings = ModelSettings(path, "float32", ROW_BLOCK, 1, STEP_TIMEOUT_S)
        expert_map = single_replica_map(1, spec.moe_layers, spec.moe.n_experts, SHARDS)
        with ExitStack() as stack:
            self._peers: dict[str, Peer] = {}
            for name in SHARDS:
                self._peers[name] = stack.enter_context(Peer(_named(serve_actor), far, "expert", name, settings))
            self._peers["router-0"] = stack.enter_context(
                Peer(_named(serve_actor), near, "router", "router-0", settings)
            )
            shards = {name: self.call(name, "listen") for name in SHARDS}
            for name in SHARDS:
                self.call(name, "load", 1, expert_map.held_by(name))
            router = self.call("router-0", "load")
            self.call("router-0", "prepare", expert_map, shards, None, _PATIENCE_S)
            self.call("router-0", "commit", 1, _PATIENCE_S)
            self._attention = stack.enter_context(Peer(_named(serve_attention), near, router, path, prompt))
            self._stack = stack.pop_all()

    def call(self, name: str, method: str, *args: Any) -> Any:
        """A method of the actor ``name``; raises what it raises."""
        self._peers[name].send((method, args))
        result, error = self._peers[name].recv(_PATIENCE_S)
        if error is not None:
            raise error
        return result

    def grow(self, count: int) -> Said:
        """``count`` more tokens."""
        self._attention.send(count)
        said: Said = self._attention.recv(_PATIENCE_S)
        return said

    def close(self) -> None:
        """Every process is killed and reaped."""
        self._stack.close()


@contextmanager
def two_nodes(network: Network, path: Path, prompt: list[int]) -> Iterator[Cluster]:
    """A cluster whose processes are ended whatever happens."""
    cluster = Cluster(network, path, prompt)
    try:
        yield cluster
    finally:
        cluster.close()


def _named(function: Callable[..., None]) -> str:
    return f"{function.__module__}:{function.__name__}"
