"""Router: for every row and MoE layer, which experts see it; moves it there and combines what comes back.

The router alone knows the expert map: attention shards never see epochs, shards, replicas, or losses. This file is its
control side and the step boundaries; ``dispatcher.py`` is what happens to a batch.

A new map comes in two calls, so that a controller can bring all its routers along: ``prepare`` connects to the shards
that are new in it, ``commit`` puts it in force at the next step boundary. ``withdraw`` takes a prepared map back.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping

import numpy as np

from actors.batch_spans import DispatchSpan
from actors.dispatcher import Dispatcher
from actors.express.router import RouterExpress
from actors.frames import Kind
from actors.groups import Groups
from actors.loop import LoopThread
from actors.losses import Known, Losses
from actors.messages import tensor_from, traced_parts
from actors.model.families import load_spec
from actors.model.gate import Gate
from actors.model.weights import Checkpoint
from actors.refusals import StaleEpoch
from actors.routes import ExpertRoutes
from actors.settings import ModelSettings
from actors.span_log import Recorded, SpanLog
from actors.stats import RouterStats, traffic
from actors.transport.base import (
    Address,
    EndpointFactory,
    Frame,
    Medium,
    PeerGone,
    ProtocolError,
    TransportError,
    Wire,
    WireTimeout,
)
from actors.transport.nccl_group import GroupPlan
from placement.expert_map import ExpertMap, held_only_by

_CONNECT_S = 10.0


class Router(Recorded):
    """One router. ``load``, then ``prepare`` and ``commit`` a map; attention shards connect to it."""

    def __init__(self, name: str, model: ModelSettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._model = model
        self._spec = load_spec(model.path)
        self._gate: Gate | None = None
        self._prepared: ExpertRoutes | None = None
        self._staged: ExpertRoutes | None = None  # to be put in force by the loop
        self._given_up = 0  # maps up to this epoch were withdrawn
        self._staging = threading.Lock()  # guards the three above
        self._committed = threading.Event()
        self._losses = Losses(f"router {name}")
        self._loaded_bytes = 0
        self._spans = SpanLog()
        last_layer = self._spec.moe_layers[-1]
        self._express = RouterExpress.made(
            model, self._spec.d_model, last_layer, self._spans, lambda: self._staged is not None
        )
        self._loop = LoopThread(
            name, self._on_frame, self._on_gone, model.thread_count, self._next_deadline, self._on_tick, self._express
        )
        self._data = Dispatcher(
            name,
            model.torch_dtype,
            model.torch_device,
            self._spec.d_model,
            last_layer,
            model.step_timeout_s,
            self._loop.drop,
            self._tell_loss,
            self._spans,
        )
        self._groups = Groups(name, model.torch_device, model.step_timeout_s)
        self._endpoint = make_endpoint(name, self._loop.add)

    # -- control (from the controller's threads) ------------------------------------------------------------------

    def load(self) -> Address:
        """Read the gate weights and start to serve. Returns where attention shards connect."""
        with Checkpoint(self._model.path, self._model.check_weights, self._model.map_weights) as checkpoint:
            self._gate = Gate.load(
                self._spec,
                checkpoint,
                self._model.torch_dtype,
                self._model.row_block,
                self._count,
                self._model.torch_device,
            )
        if self._express is not None:
            gates = {layer: self._gate.call(layer, self._model.torch_dtype) for layer in self._spec.moe_layers}
            self._express.start(self._data, gates)
        self._loop.start()
        return self._endpoint.address

    def prepare(
        self,
        expert_map: ExpertMap,
        shards: Mapping[str, Address],
        medium: Medium | None,
        timeout_s: float,
        plan: GroupPlan | None = None,
    ) -> None:
        """Connect to the shards of ``expert_map`` that have no live wire yet. The map in force stays in force.

        With a ``plan``: form that group with all its members instead. Errors: TransportError when a shard cannot be
        reached in time whose experts have no other; StaleEpoch when the epoch was withdrawn. Then nothing has changed.
        """
        with self._staging:
            if expert_map.epoch <= self._given_up:
                raise StaleEpoch(f"router {self.name}: epoch {expert_map.epoch} was given up")
            older, self._prepared = self._prepared, None
        self._discard(older)
        if plan is None:
            routes = self._connect(expert_map, shards, medium, time.monotonic() + timeout_s)
        else:
            group, wires = self._groups.join_as_router(plan, self._endpoint, shards, medium, timeout_s)
            routes = ExpertRoutes(expert_map, wires, group)
        with self._staging:
            newer = self._prepared is not None and self._prepared.epoch > expert_map.epoch
            given_up = newer or expert_map.epoch <= self._given_up
            if not given_up:
                self._prepared = routes
        if given_up:
            self._discard(routes)
            raise StaleEpoch(f"router {self.name}: epoch {expert_map.epoch} was given up")
        self._watch(routes)

    def _connect(
        self, expert_map: ExpertMap, shards: Mapping[str, Address], medium: Medium | None, deadline: float
    ) -> ExpertRoutes:
        """Routes over the wires that live and new ones. Shards that cannot be reached count as lost, if the others
        hold all of their experts; else TransportError."""
        now = self._data.routes
        wires = {s: now.wires[s] for s in expert_map.shards if now and s in now.wires and s not in now.lost}
        fresh: list[Wire] = []
        unreachable: dict[str, TransportError] = {}
        for shard in expert_map.shards:
            if shard in wires:
                continue
            try:
                wires[shard] = self._endpoint.connect(
                    shards[shard], min(deadline, time.monotonic() + _CONNECT_S), medium
                )
                fresh.append(wires[shard])
            except TransportError as error:
                unreachable[shard] = error
        if held_only_by(expert_map, unreachable):
            for wire in fresh:
                wire.close()
            raise next(iter(unreachable.values()))
        routes = ExpertRoutes(expert_map, wires)
        for shard in unreachable:
            routes.lose(shard)
        return routes

    def _watch(self, routes: ExpertRoutes) -> None:
        """Let the loop serve the wires that are new in ``routes``; what was lost of the old ones meanwhile is lost."""
        now = self._data.routes
        for shard, wire in routes.wires.items():
            if now is None or now.wires.get(shard) is not wire:
                self._loop.add(wire)
            elif shard in now.lost:
                routes.lose(shard)

    def commit(self, epoch: int, timeout_s: float) -> None:
        """Put the prepared map in force at the next step boundary; returns when it is.

        Errors: StaleEpoch when no map of this epoch is prepared, WireTimeout when a step in flight kept it from its
        commit; it is withdrawn then.
        """
        with self._staging:
            prepared = self._prepared
            if prepared is None or prepared.epoch != epoch:
                raise StaleEpoch(f"router {self.name}: epoch {epoch} is not prepared")
            self._committed.clear()
            self._staged, self._prepared = prepared, None
        self._loop.wake()
        if self._committed.wait(timeout_s):
            return
        with self._staging:
            if self._staged is not prepared:
                return
            self._staged = None
        self._discard(prepared)
        raise WireTimeout(f"router {self.name}: a step in flight kept epoch {epoch} from its commit")

    def withdraw(self, epoch: int) -> None:
        """Maps up to ``epoch`` shall not be prepared any more, one that is being prepared included: the wires made for
        them are closed, their group is left. The map in force stays. Idempotent."""
        with self._staging:
            self._given_up = max(self._given_up, epoch)
            prepared = self._prepared
            if prepared is None or prepared.epoch > epoch:
                return
            self._prepared = None
        self._discard(prepared)

    def _discard(self, routes: ExpertRoutes | None) -> None:
        """Close the wires of routes that will not be used, but for those that the map in force uses too."""
        if routes is None:
            return
        in_force = set(self._data.routes.wires.values()) if self._data.routes else set()
        for wire in routes.wires.values():
            if wire not in in_force:
                wire.close()
        if routes.group is not None:
            self._groups.leave(routes.epoch)

    def new_ids(self) -> tuple[bytes, bytes, bytes]:
        """For a :class:`GroupPlan`. This router must live until the group has formed: it answers who joins."""
        return self._groups.new_ids()

    def leave(self, epoch: int) -> None:
        """The group of ``epoch`` is over, or shall not form: no router works by it. Idempotent."""
        self._groups.leave(epoch)

    def wait_for_loss(self, epoch: int, known: frozenset[str], timeout_s: float) -> Known:
        """Epoch of the map in force, and its shards whose wires are lost: as soon as that is not (epoch, known), or
        after ``timeout_s``. Raises RuntimeError once the router is stopped."""
        return self._losses.wait((epoch, known), timeout_s)

    def expert_rows(self) -> dict[int, np.ndarray]:
        """int64[E] by layer: (row, expert) pairs that were sent to each expert since the start."""
        return {layer: rows.copy() for layer, rows in list(self._data.expert_rows.items())}

    def stats(self) -> RouterStats:
        """The map in force, load counters, and traffic. Raises RuntimeError when the data plane has failed."""
        self._loop.check()
        data, express = self._data, self._express
        rows, done, longest_wait_s = Counter(data.rows_per_shard), data.completed, data.longest_wait_s
        if express is not None:
            rows.update(express.rows_per_shard())
            done, longest_wait_s = done.with_(express.completed()), max(longest_wait_s, express.longest_wait_s)
        return RouterStats(
            pid=os.getpid(),
            epoch=data.routes.epoch if data.routes else 0,
            weight_bytes=self._loaded_bytes,
            rows_per_shard=dict(rows),
            reroutes=data.reroutes,
            longest_wait_s=longest_wait_s,
            **done._asdict(),
            bytes_sent=self._loop.bytes_sent(),
            wires=traffic(self._loop.wires()),
        )

    def start_spans(self, limit_steps: int = 0, limit_s: float = math.inf) -> None:
        """See ``SpanLog.start``. What is recorded goes the general way."""
        super().start_spans(limit_steps, limit_s)
        self._loop.wake()

    def stop(self) -> None:
        """Close every wire and end the loop thread. Idempotent."""
        self._losses.close()
        self._endpoint.close()
        self._loop.stop()
        self._groups.close()

    # -- data plane (loop thread) ---------------------------------------------------------------------------------

    def _on_frame(self, wire: Wire, frame: Frame) -> None:
        if frame.kind == Kind.ROWS:
            self._on_rows(wire, frame)
        elif frame.kind in (Kind.RESULTS, Kind.FAILED):
            self._data.on_results(wire, frame)
        else:
            raise ProtocolError(f"router {self.name}: unexpected frame of kind {frame.kind} from {wire.peer}")

    def _on_rows(self, source: Wire, frame: Frame) -> None:
        assert self._gate is not None  # the loop starts after the weights are read
        (part,), trace = traced_parts(frame, 1)
        began_ns = time.time_ns() if trace else 0
        came_ns = self._spans.begin()
        rows = tensor_from(part, self._model.torch_dtype, self._spec.d_model, self._model.torch_device)
        if self._data.routes is None:
            self._data.fail(source, frame.tag, f"router {self.name} has no expert map yet")
            return
        chosen, weight = self._gate.route(frame.tag.layer, rows)
        span = None if trace is None else DispatchSpan(self.name, trace, frame.tag.layer, len(rows), began_ns)
        layer, micro_batch = frame.tag.layer, frame.tag.micro_batch
        if came_ns:
            self._spans.end("gate", came_ns, layer=layer, micro_batch=micro_batch, rows=len(rows))
        self._data.dispatch(source, frame.tag, rows, chosen, weight, span)
        if came_ns:
            self._spans.end("dispatch", came_ns, layer=layer, micro_batch=micro_batch, rows=len(rows))

    def _on_gone(self, wire: Wire, error: PeerGone) -> None:
        self._data.lose_source(wire)
        staged = self._staged or self._prepared
        if staged is not None and staged.wires.get(wire.peer) is wire:
            staged.lose(wire.peer)
        routes = self._data.routes
        if routes is not None and routes.wires.get(wire.peer) is wire:
            self._data.lose_shard(wire.peer)

    def _tell_loss(self) -> None:
        routes = self._data.routes
        assert routes is not None  # a map comes before its losses
        self._losses.tell(routes.epoch, routes.lost)

    def _on_tick(self) -> None:
        now = time.monotonic()
        self._data.end_late(now)
        if self._staged is not None and self._data.may_switch(now):
            with self._staging:
                staged, self._staged = self._staged, None
            if staged is not None:
                self._put_in_force(staged)

    def _put_in_force(self, routes: ExpertRoutes) -> None:
        old = self._data.routes
        self._data.install(routes)
        self._committed.set()
        self._tell_loss()
        kept = set(routes.wires.values())
        for wire in old.wires.values() if old else ():
            if wire not in kept:
                self._loop.drop(wire, PeerGone("the expert map no longer uses this wire"))

    def _next_deadline(self) -> float:
        return min(self._data.next_deadline, time.monotonic() + self._model.step_timeout_s)

    def _count(self, read: int) -> None:
        self._loaded_bytes += read
