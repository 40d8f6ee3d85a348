"""What not every machine can measure: torch.distributed's gloo, ZeroMQ, a Ray actor call; our own wire under TLS."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import tempfile
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist

from actors.transport.base import Medium
from benchmarks.transport_lanes import Lane, Trip, WireLane, serve
from benchmarks.transport_peer import PATIENCE_S, Peer

_OBJECT_STORE_BYTES = 1 << 30


class Missing(Exception):
    """This one cannot be measured here; the text says why."""


class GlooPair:
    """torch.distributed with two members: this process and a peer. A process has one."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self.peer = Peer(_serve_gloo, store)
        _join_gloo(store, 0)

    def close(self) -> None:
        """End the peer, then the group."""
        self.peer.close()
        dist.destroy_process_group()
        self._folder.cleanup()


class GlooLane(Lane):
    """Over ``pair``, whose owner closes it. ``collective``: two ``all_to_all_single``, one each way, in the place of
    send and recv."""

    def __init__(self, pair: GlooPair, collective: bool) -> None:
        self.name = "gloo all_to_all_single" if collective else "gloo send/recv"
        self._pair = pair
        self._collective = collective

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        self._pair.peer.call(((size, self._collective), count))
        return _gloo_trip(size, 0, self._collective)

    def close(self) -> None:
        """See :class:`Lane`: nothing to do."""


def _join_gloo(store: str, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=PATIENCE_S)
    dist.init_process_group("gloo", f"file://{store}", timeout, world_size=2, rank=rank)


def _gloo_trip(size: int, rank: int, collective: bool) -> Trip:
    payload, into = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    nothing, other = torch.empty(0, dtype=torch.uint8), 1 - rank
    theirs, nobodys = ([0, size] if rank == 0 else [size, 0]), [0, 0]

    def give() -> None:
        if collective:
            dist.all_to_all_single(nothing, payload, nobodys, theirs)
        else:
            dist.send(payload, other)

    def take() -> None:
        if collective:
            dist.all_to_all_single(into, nothing, theirs, nobodys)
        else:
            dist.recv(into, other)

    first, second = (give, take) if rank == 0 else (take, give)

    def trip() -> None:
        first()
        second()

    return trip


def _serve_gloo(control: Connection, store: str) -> None:
    _join_gloo(store, 1)
    serve(control, lambda asked: _gloo_trip(asked[0], 1, asked[1]))
    dist.destroy_process_group()


class ZmqLane(Lane):
    """A pair of sockets over ipc, copying."""

    name = "pyzmq (ipc)"

    def __init__(self) -> None:
        zmq = _imported("zmq")
        self._folder = tempfile.TemporaryDirectory()
        address = f"ipc://{self._folder.name}/pair"
        self._context = zmq.Context()
        self._sock = self._context.socket(zmq.PAIR)
        self._sock.bind(address)
        self._peer = Peer(_serve_zmq, address)

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        self._peer.call((size, count))
        payload = os.urandom(size)

        def trip() -> None:
            self._sock.send(payload)
            self._sock.recv()

        return trip

    def close(self) -> None:
        """See :class:`Lane`."""
        self._peer.close()
        self._sock.close(0)
        self._context.term()
        self._folder.cleanup()


def _serve_zmq(control: Connection, address: str) -> None:
    zmq = _imported("zmq")
    sock = zmq.Context().socket(zmq.PAIR)
    sock.connect(address)
    serve(control, lambda size: lambda: sock.send(sock.recv()))
    sock.close(0)


class RayLane(Lane):
    """A call of an actor that returns its numpy argument, in a Ray of its own that ends with it."""

    name = "Ray actor call"

    def __init__(self) -> None:
        self._ray = ray = _imported("ray")
        os.environ.setdefault("RAY_worker_niceness", "0")
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="WARNING",
            object_store_memory=_OBJECT_STORE_BYTES,
        )

        class Echo:  # local, so that it travels by value: a worker of Ray need not find this module
            def echo(self, payload: np.ndarray) -> np.ndarray:
                return payload

        self._echo = ray.remote(Echo).remote()

    def begin(self, size: int, count: int) -> Trip:
        """See :class:`Lane`."""
        payload = np.zeros(size, np.uint8)
        return lambda: self._ray.get(self._echo.echo.remote(payload))

    def close(self) -> None:
        """See :class:`Lane`."""
        self._ray.shutdown()


class TlsLane(WireLane):
    """Our wire under TLS, both ends with the same certificate of an authority made for it."""

    def __init__(self, spin_us: float) -> None:
        authority = _imported("trustme").CA()
        leaf = authority.issue_cert("127.0.0.1")
        with tempfile.TemporaryDirectory() as folder:
            certificate, key, ca = (Path(folder) / name for name in ("node.pem", "node.key", "ca.pem"))
            certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
            leaf.private_key_pem.write_to_path(key)
            authority.cert_pem.write_to_path(ca)
            super().__init__(Medium.TLS, spin_us, (certificate, key, ca))


def _imported(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")
    return importlib.import_module(name)
