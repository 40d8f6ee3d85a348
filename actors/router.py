"""Router: for every row and MoE layer, which experts see it; moves it there and combines what comes back.

The main path: ``_on_rows`` (gate, ``dispatch``) and ``_on_results`` (``combine`` when the last shard has answered).
Both are events of one loop thread, so that several batches may be in flight at once. The router alone knows the
expert map: attention shards never see epochs, shards, or replicas.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.dispatch import ShardRows, split_rows
from actors.loop import LoopThread
from actors.messages import Kind, array_bytes, expect_parts, failure_text, tensor_bytes, tensor_from
from actors.model.combine import combine_rows
from actors.model.families import load_spec
from actors.model.gate import Gate
from actors.model.weights import Checkpoint
from actors.scratch import ScratchPool
from actors.settings import ModelSettings
from actors.stats import WireTraffic, traffic
from actors.transport.base import (
    Address,
    EndpointFactory,
    Frame,
    FrameTag,
    Medium,
    PeerGone,
    ProtocolError,
    TransportError,
    Wire,
    WireTimeout,
)
from placement.expert_map import ExpertMap


@dataclass
class DispatchHandle:
    """A batch whose rows are out at the expert shards. Made by ``dispatch``; only ``combine`` takes it.

    ``weight`` float32 [T, K]; ``out`` [T * K, D], filled as results come; ``waiting``: what each shard still owes.
    """

    source: Wire
    tag: FrameTag
    weight: Tensor
    out: Tensor
    deadline: float
    waiting: dict[Wire, ShardRows] = field(default_factory=dict)


@dataclass
class _Fleet:
    """The expert map in force and the wires to its shards, in the order of ``map.shards``."""

    map: ExpertMap
    wires: list[Wire]
    homes: dict[int, NDArray[np.int64]]


@dataclass(frozen=True)
class RouterStats:
    """``rows_per_shard``: rows sent to each expert shard since the start, by name."""

    pid: int
    epoch: int
    weight_bytes: int
    rows_per_shard: dict[str, int]
    wires: tuple[WireTraffic, ...]


class Router:
    """One router. ``load``, then ``connect`` to the expert shards of a map; attention shards connect to it."""

    def __init__(self, name: str, model: ModelSettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._model = model
        self._spec = load_spec(model.path)
        self._gate: Gate | None = None
        self._fleet: _Fleet | None = None
        self._staged: _Fleet | None = None
        self._committed = threading.Event()
        self._pending: dict[int, DispatchHandle] = {}
        self._mid_step: dict[Wire, float] = {}  # sources inside a step, and until when to believe it
        self._staging = threading.Lock()
        self._sequence = 0
        self._loaded_bytes = 0
        self._rows_per_shard: dict[str, int] = {}
        self._scratch = ScratchPool(model.torch_dtype)
        self._loop = LoopThread(
            name, self._on_frame, self._on_gone, model.thread_count, self._next_deadline, self._on_tick
        )
        self._endpoint = make_endpoint(name, self._loop.add)

    # -- control (from the controller's thread) -----------------------------------------------------------------

    def load(self) -> Address:
        """Read the gate weights and start to serve. Returns where attention shards connect."""
        with Checkpoint(self._model.path) as checkpoint:
            self._gate = Gate.load(self._spec, checkpoint, self._model.row_block, progress=self._count)
        self._loop.start()
        return self._endpoint.address

    def connect(
        self, expert_map: ExpertMap, shards: Mapping[str, Address], medium: Medium | None, timeout_s: float
    ) -> None:
        """Connect to every shard of ``expert_map`` and switch to it at the next step boundary.

        Returns once the new map is in force. Errors: TransportError when a shard cannot be reached in time.
        """
        deadline = time.monotonic() + timeout_s
        wires = self._connect_all([shards[name] for name in expert_map.shards], deadline, medium)
        number = {name: at for at, name in enumerate(expert_map.shards)}
        homes = {
            layer: np.array([number[s] for s in expert_map.homes(layer)], np.int64) for layer in expert_map.replicas
        }
        self._committed.clear()
        for wire in wires:
            self._loop.add(wire)
        with self._staging:
            self._staged = _Fleet(expert_map, wires, homes)
        self._loop.wake()
        if not self._committed.wait(max(0.0, deadline - time.monotonic())) and self._withdraw():
            for wire in wires:
                wire.close()
            raise WireTimeout(f"router {self.name}: a step in flight kept epoch {expert_map.epoch} from its commit")

    def _connect_all(self, addresses: list[Address], deadline: float, medium: Medium | None) -> list[Wire]:
        """A wire to each address, or none at all."""
        wires: list[Wire] = []
        try:
            for address in addresses:
                wires.append(self._endpoint.connect(address, deadline, medium))
        except TransportError:
            for wire in wires:
                wire.close()
            raise
        return wires

    def _withdraw(self) -> bool:
        """Take back what was staged; False if the loop has committed it meanwhile."""
        with self._staging:
            withdrawn, self._staged = self._staged is not None, None
        return withdrawn

    def stats(self) -> RouterStats:
        """The map in force, load counters, and traffic."""
        return RouterStats(
            pid=os.getpid(),
            epoch=self._fleet.map.epoch if self._fleet else 0,
            weight_bytes=self._loaded_bytes,
            rows_per_shard=dict(self._rows_per_shard),
            wires=traffic(self._loop.wires()),
        )

    def stop(self) -> None:
        """Close every wire and end the loop thread. Idempotent."""
        self._endpoint.close()
        self._loop.stop()

    # -- data plane (loop thread) -------------------------------------------------------------------------------

    def _on_frame(self, wire: Wire, frame: Frame) -> None:
        if frame.kind == Kind.ROWS:
            self._on_rows(wire, frame)
        elif frame.kind in (Kind.RESULTS, Kind.FAILED):
            self._on_results(wire, frame)
        else:
            raise ProtocolError(f"router {self.name}: unexpected frame of kind {frame.kind} from {wire.peer}")

    def _on_rows(self, source: Wire, frame: Frame) -> None:
        assert self._gate is not None  # the loop starts after the weights are read
        (part,) = expect_parts(frame, 1)
        rows = tensor_from(part, self._model.torch_dtype, self._spec.d_model)
        if self._fleet is None:
            self._fail(source, frame.tag, f"router {self.name} has no expert map yet")
            return
        self._mid_step[source] = time.monotonic() + self._model.step_timeout_s
        chosen, weight = self._gate.route(frame.tag.layer, rows)
        try:
            handle = self.dispatch(source, frame.tag, rows, chosen, weight)
        except PeerGone as error:
            self._fail(source, frame.tag, str(error))
            return
        if not handle.waiting:  # no rows: nothing to wait for
            self._reply(self._sequence, handle)

    def dispatch(self, source: Wire, tag: FrameTag, rows: Tensor, chosen: Tensor, weight: Tensor) -> DispatchHandle:
        """Send each row of ``rows`` [T, D] once to each shard that holds any of its experts ``chosen`` int64 [T, K].

        Raises PeerGone naming the shard that is gone.
        """
        assert self._fleet is not None
        fleet = self._fleet
        deadline = time.monotonic() + self._model.step_timeout_s
        handle = DispatchHandle(source, tag, weight, self._scratch.take(chosen.numel(), rows.shape[1]), deadline)
        self._sequence += 1
        out_tag = FrameTag(fleet.map.epoch, self._sequence, tag.micro_batch, tag.layer, 0)
        for share in split_rows(chosen.numpy(), fleet.homes[tag.layer], len(fleet.wires)):
            wire = fleet.wires[share.shard]
            handle.waiting[wire] = share
            try:
                self._send_share(wire, out_tag, rows, share, deadline)
            except PeerGone:
                self._scratch.give(handle.out)
                raise
            name = fleet.map.shards[share.shard]
            self._rows_per_shard[name] = self._rows_per_shard.get(name, 0) + share.rows.size
        self._pending[self._sequence] = handle
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Weighted sum [T, D] of the results, in the order of k; every shard must have answered."""
        assert not handle.waiting, "a shard still owes its results"
        tokens, k = handle.weight.shape
        return combine_rows(handle.out.view(tokens, k, -1), handle.weight, self._model.torch_dtype)

    def _send_share(self, wire: Wire, tag: FrameTag, rows: Tensor, share: ShardRows, deadline: float) -> None:
        picked = rows if share.rows.size == rows.shape[0] else rows[torch.from_numpy(share.rows)]
        parts = [
            tensor_bytes(picked),
            array_bytes(share.pair_row),
            array_bytes(share.pair_expert),
        ]
        try:
            wire.send(Kind.DISPATCH, tag, parts, deadline)
        except (PeerGone, WireTimeout) as error:
            raise PeerGone(f"expert shard {wire.peer}: {error}") from error

    def _on_results(self, wire: Wire, frame: Frame) -> None:
        handle = self._pending.get(frame.tag.step)
        if handle is None:
            return  # an answer that came after its batch had failed
        if frame.kind == Kind.FAILED:
            self._give_up(frame.tag.step, failure_text(frame))
            return
        (part,) = expect_parts(frame, 1)
        share = handle.waiting.get(wire)
        results = tensor_from(part, self._model.torch_dtype, self._spec.d_model)
        if share is None or results.shape[0] != share.pair_slot.size:
            wanted = 0 if share is None else share.pair_slot.size
            raise ProtocolError(f"expert shard {wire.peer} sent {results.shape[0]} rows, owed are {wanted}")
        del handle.waiting[wire]
        handle.out[torch.from_numpy(share.pair_slot)] = results
        if not handle.waiting:
            self._reply(frame.tag.step, handle)

    def _reply(self, sequence: int, handle: DispatchHandle) -> None:
        del self._pending[sequence]
        if handle.tag.layer == self._spec.moe_layers[-1]:
            self._mid_step.pop(handle.source, None)
        combined = self.combine(handle)
        self._scratch.give(handle.out)
        try:
            handle.source.send(Kind.ROWS_DONE, handle.tag, [tensor_bytes(combined)], handle.deadline)
        except (PeerGone, WireTimeout) as error:
            self._loop.drop(handle.source, PeerGone(str(error)))

    def _give_up(self, sequence: int, reason: str) -> None:
        """The batch cannot be completed: its attention shard is told, the late answers will be ignored."""
        handle = self._pending.pop(sequence, None)
        if handle is None:
            return  # telling an earlier batch's source lost that source, and with it this batch
        self._scratch.give(handle.out)
        self._fail(handle.source, handle.tag, reason)

    def _fail(self, source: Wire, tag: FrameTag, reason: str) -> None:
        self._mid_step.pop(source, None)
        try:
            source.send(Kind.FAILED, tag, [reason.encode()], time.monotonic() + self._model.step_timeout_s)
        except (PeerGone, WireTimeout) as error:
            self._loop.drop(source, PeerGone(str(error)))

    def _on_gone(self, wire: Wire, error: PeerGone) -> None:
        self._mid_step.pop(wire, None)
        for sequence, handle in list(self._pending.items()):
            if wire in handle.waiting:
                self._give_up(sequence, f"expert shard {wire.peer} is gone: {error}")
            elif wire is handle.source and self._pending.pop(sequence, None) is not None:
                self._scratch.give(handle.out)

    def _on_tick(self) -> None:
        now = time.monotonic()
        for sequence, handle in list(self._pending.items()):
            if handle.deadline <= now:
                late = ", ".join(wire.peer for wire in handle.waiting)
                self._give_up(sequence, f"no answer within {self._model.step_timeout_s:g} s from {late}")
        if self._staged is None or self._pending:
            return
        self._mid_step = {wire: until for wire, until in self._mid_step.items() if until > now}
        if not self._mid_step:
            with self._staging:
                staged, self._staged = self._staged, None
            if staged is not None:
                self._commit(staged)

    def _commit(self, fleet: _Fleet) -> None:
        for wire in fleet.wires:
            wire.fence(FrameTag(epoch=fleet.map.epoch))
        old, self._fleet = self._fleet, fleet
        self._committed.set()
        for wire in old.wires if old else ():
            self._loop.drop(wire, PeerGone("the expert map no longer uses this wire"))

    def _count(self, read: int) -> None:
        self._loaded_bytes += read

    def _next_deadline(self) -> float:
        soonest = min((handle.deadline for handle in self._pending.values()), default=float("inf"))
        return min(soonest, time.monotonic() + self._model.step_timeout_s)
