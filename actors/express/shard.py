"""The expert shard's express: rows in, the experts' outputs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from actors.express.calls import address, call_of, compiled
from actors.model.experts import ExpertBank
from actors.settings import ModelSettings
from actors.span_log import SpanLog
from actors.transport.base import Wire
from actors.transport.poller import SPIN_US
from actors.transport.shm import compiled_rings

if TYPE_CHECKING:
    from actors.express import _express


class Done(NamedTuple):
    """Since the start, without what went the general way."""

    rows: int = 0
    pairs: int = 0
    seconds: float = 0.0
    batches: int = 0


class ShardExpress:
    """Implements :class:`~actors.transport.poller.Express`, for the loop of an expert shard."""

    def __init__(self, native: _express.ExpertShard, spans: SpanLog) -> None:
        self._native, self._spans = native, spans
        self._watched: set[int] = set()

    @classmethod
    def made(cls, model: ModelSettings, columns: int, spans: SpanLog) -> ShardExpress | None:
        """None where everything goes the general way. ``columns``: of a row."""
        if (found := compiled(model)) is None:
            return None
        express, kernels = found
        row_bytes = columns * model.torch_dtype.itemsize
        call = call_of(kernels, model)
        return cls(express.ExpertShard(call, address(kernels.experts), columns, row_bytes, SPIN_US * 1e-6), spans)

    def install(self, bank: ExpertBank) -> None:
        """Compute the experts of this bank from now on; what is being computed by another one is not disturbed. From
        any thread."""
        self._native.install(bank.calls(), bank)

    def done(self) -> Done:
        """From any thread."""
        return Done(*self._native.done())

    def watch(self, wire: Wire, fds: Sequence[int]) -> None:
        """See :class:`~actors.transport.poller.Express`."""
        rings = compiled_rings(wire)
        if rings is not None and fds:
            self._watched.add(fds[0])
            self._native.watch(fds[0], *rings)

    def forget(self, fds: Sequence[int]) -> None:
        """See :class:`~actors.transport.poller.Express`."""
        if fds and fds[0] in self._watched:
            self._watched.remove(fds[0])
            self._native.forget(fds[0])

    def usable(self) -> bool:
        """See :class:`~actors.transport.poller.Express`."""
        return not self._spans.recording

    def wait(self, epoll: int, deadline: float) -> Sequence[tuple[int, int]]:
        """See :class:`~actors.transport.poller.Express`."""
        return self._native.wait(epoll, deadline)
