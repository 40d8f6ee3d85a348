"""One MoE layer without its compute: attention shard → router → expert shards → router → attention shard.

The messages, the dispatcher and the loops are the project's own; the experts return each pair's row as it came, and the
gate's choice is drawn once. Each actor is a process.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.dispatch import split_rows
from actors.dispatcher import Dispatcher
from actors.express.calls import address, call_of, compiled
from actors.express.router import RouterExpress
from actors.express.shard import ShardExpress
from actors.frames import Kind
from actors.loop import LoopThread
from actors.messages import encode_seconds, indices_from, tensor_from, tensor_part, traced_parts
from actors.model.combine import combine_rows
from actors.model.gate import GateCall
from actors.moe_client import MoEClient
from actors.native.gate import GateFields, choose
from actors.routes import ExpertRoutes
from actors.settings import ModelSettings
from actors.span_log import SpanLog
from actors.transport.base import Address, Frame, Medium, PeerGone, Wire
from actors.transport.endpoint import Endpoint
from actors.transport.poller import SPIN_US
from benchmarks.transport_figures import LayerBytes
from benchmarks.transport_lanes import timed
from benchmarks.transport_peer import NODE, PATIENCE_S, SECRET, Peer, pin, until_closed
from placement.expert_map import single_replica_map

DTYPE = torch.bfloat16
_LAYER = 0
_CPU = torch.device("cpu")
_SECONDS_BYTES = 8
_GATE_COLUMNS = 32


@dataclass(frozen=True)
class Shape:
    """A batch of one layer: ``rows`` of ``width`` bf16, each for ``top`` of ``experts``."""

    rows: int = 16
    width: int = 2048
    top: int = 6
    experts: int = 64

    def gate(self) -> GateFields:
        """One that takes the batch for rows of few columns: the choice alone is to take time, not its products."""
        weight = torch.randn(self.experts, _GATE_COLUMNS, generator=torch.Generator().manual_seed(3)).to(DTYPE)
        fields = GateFields.of(weight, None, torch.float32, self.top, 1, 1, True, False, True, 0.0, 0.0, 1.0)
        fields.kept = weight
        return fields

    def choice(self) -> tuple[NDArray[np.int64], Tensor]:
        """That gate's: experts int64[rows, top] and weights float32[rows, top], always the same."""
        few = self.batch().view(-1)[: self.rows * _GATE_COLUMNS].view(self.rows, _GATE_COLUMNS)
        chosen, weight = choose(self.gate(), few, torch.float32)
        return chosen.numpy(), weight

    def batch(self) -> Tensor:
        """[rows, width] bf16, always the same."""
        return torch.randn(self.rows, self.width, generator=torch.Generator().manual_seed(7)).to(DTYPE)

    def result(self) -> Tensor:
        """[rows, width]: what comes back when every expert returns its row."""
        out = self.batch()[:, None].expand(self.rows, self.top, self.width)
        return combine_rows(out, self.choice()[1], DTYPE)


def moved(shape: Shape, shards: int) -> LayerBytes:
    """Bytes of the parts of all frames, where the experts lie round robin on ``shards``."""
    chosen, row = shape.choice()[0], shape.width * DTYPE.itemsize
    split = split_rows(chosen, np.arange(chosen.size), chosen.reshape(-1) % shards)
    return LayerBytes(
        shape.rows * row,
        tuple(s.rows.size * row + s.pair_row.nbytes + s.pair_expert.nbytes for s in split),
        tuple(s.pair_slot.size * row + _SECONDS_BYTES for s in split),
    )


class Layer:
    """``routers`` attention shards, a router each, and ``shards`` expert shards, over wires of one medium."""

    def __init__(self, shape: Shape, medium: Medium, shards: int, routers: int = 1) -> None:
        with ExitStack() as stack:
            experts = {f"expert-{n}": stack.enter_context(Peer(_serve_shard, f"expert-{n}")) for n in range(shards)}
            addresses = {name: peer.call("address") for name, peer in experts.items()}
            self._hidden = [stack.enter_context(Peer(_serve_router, shape, addresses, medium)) for _ in range(routers)]
            self._attention = [
                stack.enter_context(Peer(_serve_attention, shape, router.call("address"), medium))
                for router in self._hidden
            ]
            self._hidden += experts.values()
            self._stack = stack.pop_all()

    def burst(self, count: int) -> list[float]:
        """Seconds of ``count`` layers of each attention shard; all of them at once."""
        for peer in self._attention:
            peer.send(count)
        return [second for peer in self._attention for second in peer.recv()]

    def cpu(self) -> float:
        """Seconds that the routers' and the expert shards' processes have computed so far."""
        return sum(peer.call("cpu") for peer in self._hidden)

    def close(self) -> None:
        """End all processes."""
        self._stack.close()


def _serve_attention(control: Connection, shape: Shape, router: Address, medium: Medium) -> None:
    pin(0)
    torch.set_num_threads(1)
    endpoint = Endpoint("attention", NODE, SECRET)
    wire = endpoint.connect(router, time.monotonic() + PATIENCE_S, medium)
    client = MoEClient(wire, DTYPE, _CPU, shape.width, PATIENCE_S, (_LAYER,))
    rows, result = shape.batch(), shape.result()

    def burst(count: int) -> list[float]:
        client.begin_step()
        if not torch.equal(client.finish(client.start(_LAYER, rows)), result):
            raise RuntimeError("the layer came back with other rows than the experts had returned")
        return [timed(lambda: client.finish(client.start(_LAYER, rows))) for _ in range(count)]

    with torch.inference_mode():
        until_closed(control, burst)
    wire.close()


def _serve_router(control: Connection, shape: Shape, shards: dict[str, Address], medium: Medium) -> None:
    pin(1)
    torch.set_num_threads(1)
    experts, weight = shape.choice()
    gate, chosen, settings = shape.gate(), torch.from_numpy(experts), _settings()
    express = RouterExpress.made(settings, shape.width, _LAYER, SpanLog(), lambda: False)

    def on_frame(wire: Wire, frame: Frame) -> None:
        if frame.kind != Kind.ROWS:
            data.on_results(wire, frame)
            return
        (part,), _ = traced_parts(frame, 1)
        data.dispatch(wire, frame.tag, tensor_from(part, DTYPE, shape.width), chosen, weight)

    loop = LoopThread("router", on_frame, _ignore, threads=1, express=express)
    data = Dispatcher("router", DTYPE, _CPU, shape.width, _LAYER, PATIENCE_S, loop.drop)
    endpoint = Endpoint("router", NODE, SECRET, on_wire=loop.add)
    deadline = time.monotonic() + PATIENCE_S
    wires = {name: endpoint.connect(address, deadline, medium) for name, address in shards.items()}
    data.install(ExpertRoutes(single_replica_map(1, (_LAYER,), shape.experts, tuple(shards)), wires))
    if express is not None:
        express.start(data, {_LAYER: GateCall(ctypes.addressof(gate), shape.rows, shape.top, torch.float32)})
    for wire in wires.values():
        loop.add(wire)
    _serve_loop(control, endpoint, loop)


def _settings() -> ModelSettings:
    return ModelSettings(Path(), "bfloat16", 0, 1, PATIENCE_S)


def _serve_shard(control: Connection, name: str) -> None:
    pin(int(name.rpartition("-")[2]))
    torch.set_num_threads(1)

    def on_frame(wire: Wire, frame: Frame) -> None:
        (rows_part, pair_row, _), _ = traced_parts(frame, 3)
        rows = tensor_from(rows_part, DTYPE, Shape.width)
        out = rows.index_select(0, indices_from(pair_row))
        deadline = time.monotonic() + PATIENCE_S
        wire.send(Kind.RESULTS, frame.tag, [tensor_part(out, wire), encode_seconds(0.0)], deadline)

    loop = LoopThread(name, on_frame, _ignore, threads=1, express=_echo())
    _serve_loop(control, Endpoint(name, NODE, SECRET, on_wire=loop.add), loop)


def _echo() -> ShardExpress | None:
    """Experts that return their rows by a function of C++, as the real ones are; None where express is not built."""
    if (found := compiled(_settings())) is None:
        return None
    with TemporaryDirectory() as folder:
        made = Path(folder) / "echo.so"
        source = Path(__file__).with_name("echo.cpp")
        subprocess.run(["g++", "-O2", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
        function = ctypes.CDLL(str(made)).expertmesh_experts
    express, kernels = found
    row_bytes = Shape.width * DTYPE.itemsize
    native = express.ExpertShard(
        call_of(kernels, _settings()), address(function), Shape.width, row_bytes, SPIN_US * 1e-6
    )
    native.install([(_LAYER, 0, 0, 0, 1, Shape.experts, math.inf)], function)
    return ShardExpress(native, SpanLog())


def _ignore(wire: Wire, error: PeerGone) -> None:
    """The benchmark ends its processes one after the other."""


def _serve_loop(control: Connection, endpoint: Endpoint, loop: LoopThread) -> None:
    answers: dict[str, Callable[[], Any]] = {"address": lambda: endpoint.address, "cpu": time.process_time}
    loop.start()
    until_closed(control, lambda message: answers[message]())
    endpoint.close()
    loop.stop()
