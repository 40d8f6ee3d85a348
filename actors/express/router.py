"""The router's express: batches that go as they should, from the rows that come to the combined ones that go back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from actors.dispatch import Owners, ShardRows
from actors.dispatcher import Completed, Dispatcher, DispatchHandle
from actors.express.calls import address, call_of, compiled
from actors.model.combine import Piece
from actors.model.gate import GateCall
from actors.native import dispatch
from actors.native.matrix import KINDS
from actors.routes import ExpertRoutes
from actors.settings import ModelSettings
from actors.span_log import SpanLog
from actors.transport.base import FrameTag, Wire
from actors.transport.poller import SPIN_US
from actors.transport.ring import Ring
from actors.transport.shm import compiled_rings

if TYPE_CHECKING:
    from actors.express import _express


class RouterExpress:
    """Implements :class:`~actors.transport.poller.Express` from :meth:`start` on, for the loop of a router.

    ``held`` tells that batches shall come to a boundary by the general way, which is where maps are changed.
    """

    def __init__(
        self, native: _express.Router, columns: int, dtype: torch.dtype, spans: SpanLog, held: Callable[[], bool]
    ) -> None:
        """Rows have so many ``columns`` of ``dtype``."""
        self._native, self._spans, self._held = native, spans, held
        self._dtype, self._columns = dtype, columns
        self._data: Dispatcher | None = None
        self._gates: Mapping[int, GateCall] = {}
        self._wires: dict[int, Wire] = {}
        self._installed: tuple[ExpertRoutes, frozenset[str]] | None = None
        self._fits = False
        self._kept: list[tuple[Owners, NDArray[np.int64]]] = []  # what was installed points there

    @classmethod
    def made(
        cls, model: ModelSettings, columns: int, last_layer: int, spans: SpanLog, held: Callable[[], bool]
    ) -> RouterExpress | None:
        """None where everything goes the general way. ``last_layer``: see the dispatcher."""
        if (found := compiled(model)) is None:
            return None
        express, kernels = found
        row_bytes = columns * model.torch_dtype.itemsize
        call, functions = call_of(kernels, model), (address(kernels.gate), address(kernels.combine))
        timeout_s, spin_s = model.step_timeout_s, SPIN_US * 1e-6
        native = express.Router(call, *functions, columns, row_bytes, last_layer, timeout_s, spin_s)
        return cls(native, columns, model.torch_dtype, spans, held)

    def start(self, data: Dispatcher, gates: Mapping[int, GateCall | None]) -> None:
        """From now on it serves what ``data`` would, of the layers that have a gate."""
        self._gates = {layer: call for layer, call in gates.items() if call is not None}
        self._data = data

    def watch(self, wire: Wire, fds: Sequence[int]) -> None:
        """See :class:`~actors.transport.poller.Express`."""
        rings = compiled_rings(wire)
        if rings is not None and fds:
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
        return Completed(*self._native.completed()[:3])

    @property
    def longest_wait_s(self) -> float:
        """As the dispatcher's."""
        return self._native.completed()[3]

    def rows_per_shard(self) -> dict[str, int]:
        """As the dispatcher's."""
        return self._native.rows_sent()

    def _install(self, data: Dispatcher, routes: ExpertRoutes) -> bool:
        """False if these routes are not for express."""
        shards: list[tuple[Ring | None, Ring | None, str]] = []
        for name in routes.names:
            rings = (None, None) if name in routes.lost else compiled_rings(routes.wires[name])
            if rings is None:
                return False
            shards.append((*rings, name))
        kept = {
            layer: (routes.owners(layer), data.load_of(layer)) for layer in routes.map.replicas if layer in self._gates
        }
        layers = [self._layer(layer, owners, load) for layer, (owners, load) in kept.items()]
        self._native.install(routes.epoch, shards, layers)
        self._kept = list(kept.values())
        return True

    def _layer(self, layer: int, owners: Owners, load: NDArray[np.int64]) -> tuple[int, ...]:
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
