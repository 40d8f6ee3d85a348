"""The router's express: batches that go as they should, from the rows that come to the combined ones that go back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from actors.dispatch import Owners, ShardRows
from actors.dispatcher import Completed, Dispatcher, DispatchHandle
from actors.express.calls import address, call_of, compiled
from actors.model.combine import Piece
from actors.model.gate import Gate, GateCall
from actors.native import dispatch
from actors.native.matrix import KINDS
from actors.routes import ExpertRoutes
from actors.settings import ModelSettings
from actors.span_log import SpanLog
from actors.transport.base import FrameTag, Wire
from actors.transport.poller import SPIN_US
from actors.transport.ring import Ring
from actors.transport.shm import ShmWire, compiled_rings


class RouterExpress:
    """Implements :class:`~actors.transport.poller.Express` from :meth:`start` on, for the loop of a router.

    ``held`` tells that batches shall come to a boundary by the general way, which is where maps are changed.
    """

    def __init__(self, model: ModelSettings, columns: int, last_layer: int, spans: SpanLog, held: Callable[[], bool]):
        """``columns``: of a row. ``last_layer``: see the dispatcher."""
        self._spans, self._held = spans, held
        self._dtype, self._columns = model.torch_dtype, columns
        self._data: Dispatcher | None = None
        self._gates: Mapping[int, GateCall] = {}
        self._wires: dict[int, Wire] = {}
        self._installed: tuple[ExpertRoutes, frozenset[str]] | None = None
        self._fits = False
        self._kept: list[tuple[Owners, np.ndarray]] = []
        self._native = None
        if (found := compiled(model)) is not None:
            express, kernels = found
            self._native = express.Router(
                call_of(kernels, model),
                address(kernels.gate),
                address(kernels.combine),
                columns,
                columns * self._dtype.itemsize,
                last_layer,
                model.step_timeout_s,
                SPIN_US * 1e-6,
            )

    def start(self, data: Dispatcher, gate: Gate, layers: Sequence[int]) -> None:
        """From now on it serves what ``data`` would, and picks experts as ``gate`` does."""
        if self._native is not None:
            found = {layer: gate.call(layer, self._dtype) for layer in layers}
            self._gates = {layer: call for layer, call in found.items() if call is not None}
            self._data = data

    def watch(self, wire: Wire, fds: Sequence[int]) -> None:
        """See :class:`~actors.transport.poller.Express`."""
        rings = compiled_rings(wire)
        if self._native is not None and rings is not None and fds:
            self._wires[fds[0]] = wire
            self._native.watch(fds[0], *rings)

    def forget(self, fds: Sequence[int]) -> None:
        """See :class:`~actors.transport.poller.Express`."""
        if fds and self._wires.pop(fds[0], None) is not None:
            self._native.forget(fds[0])

    def usable(self) -> bool:
        """See :class:`~actors.transport.poller.Express`."""
        data = self._data
        if data is None or data.routes is None or not data.steady or self._spans.recording or self._held():
            return False
        routes = data.routes
        if self._installed is None or self._installed[0] is not routes or self._installed[1] is not routes.lost:
            self._fits = self._install(data, routes)
            self._installed = routes, routes.lost
        return self._fits

    def wait(self, epoll: int, deadline: float) -> Sequence[tuple[int, int]]:
        """See :class:`~actors.transport.poller.Express`. What is under way at the end is the dispatcher's."""
        assert self._data is not None
        self._native.number = self._data.number
        try:
            return self._native.wait(epoll, deadline)
        finally:
            self._data.number = self._native.number
            self._hand_over(self._data)

    def completed(self) -> Completed:
        """As the dispatcher's, of the batches that were completed here."""
        return Completed() if self._native is None else Completed(*self._native.completed()[:3])

    @property
    def longest_wait_s(self) -> float:
        """As the dispatcher's."""
        return 0.0 if self._native is None else self._native.completed()[3]

    def rows_per_shard(self) -> dict[str, int]:
        """As the dispatcher's."""
        return {} if self._native is None else self._native.rows_sent()

    def _install(self, data: Dispatcher, routes: ExpertRoutes) -> bool:
        """False if these routes are not for express."""
        shards: list[tuple[Ring | None, Ring | None, str]] = []
        for name in routes.names:
            rings = (None, None) if name in routes.lost else compiled_rings(routes.wires[name])
            if rings is None:
                return False
            shards.append((*rings, name))
        kept = {layer: (routes.owners(layer), data.load_of(layer)) for layer in routes.map.replicas if layer in self._gates}
        layers = [self._layer(layer, owners, load) for layer, (owners, load) in kept.items()]
        self._native.install(routes.epoch, shards, layers)
        self._kept = list(kept.values())
        return True

    def _layer(self, layer: int, owners: Owners, load: np.ndarray) -> tuple[int, ...]:
        gate = self._gates[layer]
        picked = gate.address, gate.most_rows, gate.top_k, KINDS[gate.weights]
        return layer, *picked, *owners.places, load.size, dispatch.address(load)

    def _hand_over(self, data: Dispatcher) -> None:
        batches, sources = self._native.hand_over()
        for fd, mid_step, until in sources:
            data.note_step(self._wires[fd], until if mid_step else None)
        for number, fd, tag, rows, chosen, weight, began, deadline, experts_s, shares in batches:
            top_k = self._gates[tag[3]].top_k
            handle = DispatchHandle(
                number,
                self._wires[fd],
                FrameTag._make(tag),
                torch.frombuffer(rows, dtype=self._dtype).view(-1, self._columns),
                memoryview(rows),
                np.frombuffer(chosen, np.int64).reshape(-1, top_k),
                torch.frombuffer(weight, dtype=self._gates[tag[3]].weights).view(-1, top_k),
                began,
                deadline,
                [],
                attempts=len(shares),
                experts_s=experts_s,
            )
            for share in shares:
                self._add(handle, data, *share)
            data.take_over(handle)

    def _add(
        self,
        handle: DispatchHandle,
        data: Dispatcher,
        shard: int,
        attempt: int,
        rows: bytes,
        pair_row: bytes,
        pair_expert: bytes,
        slots: bytes,
        results: bytearray | None,
    ) -> None:
        """What one shard was asked for, or has answered. ``address`` of slots wants them writable."""
        assert data.routes is not None
        slot = np.frombuffer(bytearray(slots), np.int64)
        if results is not None:
            handle.came.append(Piece(slot, memoryview(results)))
            return
        share = ShardRows(
            shard,
            np.frombuffer(rows, np.int64),
            np.frombuffer(pair_row, np.int32),
            np.frombuffer(pair_expert, np.int32),
            slot,
        )
        handle.owed[attempt] = (data.routes.names[shard], share)
