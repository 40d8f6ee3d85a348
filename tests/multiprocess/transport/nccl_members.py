"""Members of a group in processes of their own: routers that send batches, shards that answer them."""

from __future__ import annotations

import os
import queue
import random
import signal
import threading
import time
import traceback
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.loop import LoopThread
from actors.transport.base import Address, Frame, FrameTag, Medium, PeerGone, TransportError, Wire, WireTimeout
from actors.transport.cupy_nccl import CupyBackend
from actors.transport.endpoint import Endpoint
from actors.transport.nccl import NcclWire
from actors.transport.nccl_group import GroupPlan, NcclGroup
from actors.transport.nccl_join import Lobby, join_as_router, join_as_shard
from actors.transport.poller import Poller
from tests.multiprocess.peers import Peer
from tests.multiprocess.transport.nccl_double import DoubleBackend
from tests.multiprocess.transport.remote import NODE, SECRET, soon

NOISE_BYTES = 6 << 20
_NOISE = torch.from_numpy(np.random.default_rng(11).integers(0, 256, NOISE_BYTES, np.uint8))
_SIZES = (0, 1, 7, 64, 4096, 4097, 70_000)
_LARGE = (1 << 20, (3 << 20) + 5)

DISPATCH, RESULTS = 3, 4

Sizes = Sequence[Sequence[int]]
"""For each batch the bytes for each shard, in the order of the plan."""


def random_sizes(seed: int, batches: int, shards: int) -> list[list[int]]:
    """Uneven, empty, all to one, a byte, now and then mebibytes."""
    rng = random.Random(seed)
    made = []
    for _ in range(batches):
        sizes = [rng.choice(_LARGE if rng.random() < 0.01 else _SIZES) for _ in range(shards)]
        if rng.random() < 0.2:
            only = rng.randrange(shards)
            sizes = [size if at == only else 0 for at, size in enumerate(sizes)]
        made.append(sizes)
    return made


def digest(tensor: Tensor) -> bytes:
    """What goes along on the host, so that both ends check what the device part brought."""
    return zlib.crc32(tensor.cpu().numpy().data).to_bytes(4, "little")


@dataclass
class Report:
    """What came of some batches."""

    done: int
    error: str
    seconds: float
    dropped: int
    allocations: int


class Member:
    """One member: an endpoint, and groups by epoch. Commands come from the process's main thread."""

    def __init__(self, name: str, device: int | None) -> None:
        self.name = name
        self.backend = DoubleBackend() if device is None else CupyBackend(torch.device("cuda", device))
        self.noise = _NOISE.to(self.backend.device)
        self.groups: dict[int, NcclGroup] = {}
        self.wires: dict[int, dict[str, NcclWire]] = {}
        self.lobby = Lobby()
        self.endpoint = Endpoint(name, NODE, SECRET, on_wire=self.lobby.park, spin_us=0.0)
        self.loop = LoopThread(name, self._serve, self._lost, 1)
        self.loop.start()
        self.lost: queue.Queue[str] = queue.Queue()
        self.reports: queue.Queue[Report] = queue.Queue()

    def address(self) -> Address:
        return self.endpoint.address

    def ids(self) -> tuple[bytes, bytes, bytes]:
        return self.backend.unique_id(), self.backend.unique_id(), self.backend.unique_id()

    def form(
        self,
        plan: GroupPlan,
        shards: Mapping[str, Address],
        medium: Medium | None = None,
        seconds: float = 20.0,
        timeout_s: float = 10.0,
    ) -> str:
        """Join the group of this plan; "formed", or the name of the error."""
        is_router = self.name in plan.routers
        deadline = soon(seconds)
        try:
            if is_router:
                joined = join_as_router(
                    plan, self.name, self.endpoint, shards, self.backend, deadline, medium, timeout_s
                )
            else:
                joined = join_as_shard(plan, self.name, self.lobby, self.backend, deadline, timeout_s)
        except TransportError as error:
            return type(error).__name__
        self.groups[plan.epoch], self.wires[plan.epoch] = joined
        for wire in joined.wires.values() if not is_router else ():
            self.loop.add(wire)
        return "formed"

    def retire(self, epoch: int) -> None:
        """Close the wires in order, then the group."""
        self.leave(epoch)
        self.groups.pop(epoch).close()

    def failure(self, epoch: int, seconds: float = 10.0) -> str | None:
        """Why the group is over, waiting for it to be."""
        deadline = time.monotonic() + seconds
        while self.groups[epoch].failure is None and time.monotonic() < deadline:
            time.sleep(1e-3)
        return self.groups[epoch].failure

    def leave(self, epoch: int) -> None:
        """Close the wires in order; the group stays."""
        for wire in self.wires.pop(epoch).values():
            wire.close()

    def die_at(self, point: str, after: int) -> None:
        """kill -9 this process at the ``after``-th time that it comes to ``point`` (a method of any group)."""
        method, left = getattr(NcclGroup, point), after

        def dying(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments)

        setattr(NcclGroup, point, dying)

    # -- a shard -----------------------------------------------------------------------------------------------------

    def _serve(self, wire: Wire, frame: Frame) -> None:
        """Answer with the payload's complement."""
        told, payload = frame.parts
        assert isinstance(payload, Tensor)
        assert bytes(told) == digest(payload), "the payload is not what was announced"
        answer = torch.bitwise_not(payload)
        assert isinstance(wire, NcclWire)
        wire.send(RESULTS, frame.tag, [answer, digest(answer)], soon())

    def _lost(self, wire: Wire, error: PeerGone) -> None:
        self.lost.put(f"{wire.peer}: {error}")

    # -- a router ----------------------------------------------------------------------------------------------------

    def drive(self, epoch: int, sizes: Sizes, depth: int = 2, patience: float = 20.0) -> None:
        """Send these batches in a thread of its own, up to ``depth`` at a time; ``report`` tells what came of it."""
        threading.Thread(target=self._drive, args=(epoch, sizes, depth, patience), daemon=True).start()

    def report(self) -> Report:
        """Of the oldest ``drive`` not reported yet."""
        return self.reports.get(timeout=60)

    def _drive(self, epoch: int, sizes: Sizes, depth: int, patience: float) -> None:
        begin, done, error = time.monotonic(), 0, ""
        wires = self.wires[epoch]
        owed: dict[int, dict[str, Tensor]] = {}
        poller = Poller(0.0)
        for wire in wires.values():
            poller.add(wire)
        try:
            while done < len(sizes):
                while len(owed) < depth and done + len(owed) < len(sizes):
                    step = done + len(owed)
                    owed[step] = self._send_batch(epoch, step, sizes[step], patience)
                self._collect(poller, owed, patience)
                while done in owed and not owed[done]:
                    del owed[done]
                    done += 1
        except TransportError as failure:
            error = f"{type(failure).__name__}: {failure}"
        except BaseException:
            error = traceback.format_exc()
        poller.close()
        dropped = sum(wire.stats.dropped for wire in wires.values())
        seconds = time.monotonic() - begin
        self.reports.put(Report(done, error, seconds, dropped, self.groups[epoch].pool.allocations))
        if error:
            for wire in wires.values():
                wire.close()

    def _send_batch(self, epoch: int, step: int, sizes: Sequence[int], patience: float) -> dict[str, Tensor]:
        group, wanted = self.groups[epoch], {}
        with group.batch():
            for at, (name, size) in enumerate(zip(group.plan.shards, sizes, strict=True)):
                start = (step * 7919 + at * 104_729) % (NOISE_BYTES - size)
                payload = self.noise[start : start + size]  # at an odd offset, as a slice of a larger tensor
                tag = FrameTag(epoch, step)
                wire, parts = self.wires[epoch][name], [digest(payload), payload]
                if step % 3:
                    wire.ask(DISPATCH, tag, parts, size, soon(patience))
                else:
                    wire.send(DISPATCH, tag, parts, soon(patience))
                wanted[name] = payload
        return wanted

    def _collect(self, poller: Poller, owed: dict[int, dict[str, Tensor]], patience: float) -> None:
        ready = poller.wait(soon(patience))
        if not ready:
            raise WireTimeout("no answer")
        for wire in ready:
            frame = wire.recv(soon())
            answer: Any = frame.parts[0]
            sent = owed[frame.tag.step].pop(wire.peer)
            assert bytes(frame.parts[1]) == digest(answer), "the answer is not what was announced"
            assert torch.equal(answer, torch.bitwise_not(sent)), f"a wrong answer from {wire.peer}"


def run_member(connection: Connection, name: str, device: int | None) -> None:
    """In the member's process: carry out (command, *arguments) until the pipe ends; answer with (result, error)."""
    torch.set_num_threads(1)
    member = Member(name, device)
    while True:
        try:
            command, *arguments = connection.recv()
        except EOFError:
            return
        try:
            result = getattr(member, command)(*arguments)
        except Exception:
            connection.send((None, traceback.format_exc()))
        else:
            connection.send((result, None))


class Fleet:
    """The members of a test, each a process; forms groups among them.

    Over the double, or with ``on_devices`` over NCCL, each member on a GPU of its own in the order of their start.
    """

    def __init__(self, on_devices: bool = False) -> None:
        self._on_devices = on_devices
        self._stack = ExitStack()
        self.peers: dict[str, Peer] = {}
        self.addresses: dict[str, Address] = {}

    def start(self, *names: str) -> None:
        """More members."""
        for name in names:
            device = len(self.peers) if self._on_devices else None
            member = Peer("tests.multiprocess.transport.nccl_members:run_member", name, device)
            self.peers[name] = self._stack.enter_context(member)
        for name in names:
            self.addresses[name] = self.call(name, "address")

    def tell(self, name: str, command: str, *arguments: Any) -> None:
        """Begin a command."""
        self.peers[name].send((command, *arguments))

    def hear(self, name: str, timeout: float = 60.0) -> Any:
        """The result of the oldest command not heard yet; AssertionError with the member's traceback."""
        result, error = self.peers[name].recv(timeout)
        assert error is None, f"in {name}: {error}"
        return result

    def call(self, name: str, command: str, *arguments: Any) -> Any:
        """tell and hear."""
        self.tell(name, command, *arguments)
        return self.hear(name)

    def each(self, names: Sequence[str], command: str, *arguments: Any) -> list[Any]:
        """Tell all, then hear all."""
        for name in names:
            self.tell(name, command, *arguments)
        return [self.hear(name) for name in names]

    def plan(self, epoch: int, routers: Sequence[str], shards: Sequence[str]) -> GroupPlan:
        """With ids made by the first router."""
        ids = self.call(routers[0], "ids")
        return GroupPlan(epoch, *ids, tuple(routers), tuple(shards))

    def form(
        self,
        epoch: int,
        routers: Sequence[str],
        shards: Sequence[str],
        medium: Medium | None = None,
        timeout_s: float = 10.0,
    ) -> GroupPlan:
        """A group that all of them are in."""
        plan = self.plan(epoch, routers, shards)
        formed = self.each(plan.members, "form", plan, self.addresses, medium, 20.0, timeout_s)
        assert formed == ["formed"] * len(plan.members)
        return plan

    def close(self) -> None:
        """End every process."""
        self._stack.close()
