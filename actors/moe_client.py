"""An attention shard's view of the experts: one wire to its router."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from actors.frames import Kind, expect_parts
from actors.messages import failure_text, tensor_bytes, tensor_from, times_from
from actors.span_log import ROWS_OUT, WAIT, SpanLog
from actors.transport.base import Buffer, Frame, FrameTag, ProtocolError, TransportError, Wire

_TRACED_LAYERS = 16
"""At most so many layers of a traced step have spans: one of the router and one of each expert shard, for each."""


def traced_layers(moe_layers: Sequence[int]) -> frozenset[int]:
    """Those of a model's MoE layers that a traced step shows: spread evenly, the first and the last among them."""
    last = len(moe_layers) - 1
    if last < _TRACED_LAYERS:
        return frozenset(moe_layers)
    return frozenset(moe_layers[round(n * last / (_TRACED_LAYERS - 1))] for n in range(_TRACED_LAYERS))


class MoEUnavailable(RuntimeError):
    """The routed experts' part of a layer could not be computed; the step is void, nothing of it was published."""


class RowsSent(NamedTuple):
    """Rows of one layer that are on their way since ``began`` (perf_counter); only ``finish`` takes it, once."""

    tag: FrameTag
    n_rows: int
    began: float


class _Early(NamedTuple):
    """An answer that came while another was waited for: rows [T, D] in its frame, which is kept until ``let_go``."""

    rows: Tensor
    let_go: Callable[[], None]


class MoEClient:
    """Implements ``actors.model.decoder.MoE`` over the wire to the router. Several requests may be under way.

    Of this step: ``batches`` were sent, and ``waited_s`` seconds nothing was done but wait for their answers. On a
    GPU ``start`` waits for the device, which has to have the rows, and ``finish`` may wait while the device still
    computes the shared expert: what is left of a step is then the attention's part without the shared experts.

    ``experts_s``: the slowest expert shard's seconds of computing, summed over the answers; ``transfer_s``: half of
    what else their round trips took, summed likewise (T_e and T_c of MegaScale-Infer, arXiv 2504.02263). An answer that
    was here before it was waited for may have come any time: its trip from the router on counts as its round trip.
    With several batches under way, the wait of one behind another counts as transfer too.

    ``when_sent``: called by the first ``finish`` of a step, whose first rows are on their way then; it is None before
    it is called. The time that it takes is added to the step's.
    """

    def __init__(
        self,
        wire: Wire,
        dtype: torch.dtype,
        device: torch.device,
        d_model: int,
        step_timeout_s: float,
        moe_layers: Sequence[int],
        spans: SpanLog | None = None,
    ) -> None:
        self.wire = wire
        self.batches = 0
        self.waited_s = 0.0
        self.experts_s = 0.0
        self.transfer_s = 0.0
        self.when_sent: Callable[[], None] | None = None
        self._device = device
        self._dtype = dtype
        self._d_model = d_model
        self._timeout_s = step_timeout_s
        self._step = 0
        self._deadline = 0.0
        self._traced_layers = traced_layers(moe_layers)
        self._trace: list[Buffer] = []
        self._sent: dict[FrameTag, RowsSent] = {}
        self._early: dict[FrameTag, _Early] = {}
        self._let_go: Callable[[], None] | None = None  # of the one of these that was handed out last
        self._part: tuple[Tensor | None, memoryview] = None, memoryview(b"")
        self._spans = spans or SpanLog()

    def begin_step(self, traceparent: str = "") -> None:
        """A new step: answers that belong to an earlier one are stale from now on.

        ``traceparent``: of the step's span, if it is traced.
        """
        self._step += 1
        self.batches, self.waited_s, self.experts_s, self.transfer_s = 0, 0.0, 0.0, 0.0
        self._trace = [traceparent.encode()] if traceparent else []
        self._deadline = time.monotonic() + self._timeout_s
        self._part = None, memoryview(b"")
        self._forget()
        self.wire.fence(FrameTag(step=self._step))

    def abandon(self) -> None:
        """The step is void: what still comes for it is stale."""
        self._forget()
        self.wire.fence(FrameTag(step=self._step + 1))

    def start(self, layer: int, rows: Tensor, micro_batch: int = 0) -> RowsSent:
        """Send ``rows`` [T, D] of ``layer`` to the router; see the decoder's ``MoE`` for how micro-batches are
        numbered. Raises MoEUnavailable."""
        sent = RowsSent(FrameTag(0, self._step, micro_batch, layer), rows.shape[0], time.perf_counter())
        trace = self._trace if layer in self._traced_layers else []
        began_ns = self._spans.begin()
        try:
            self.wire.send(Kind.ROWS, sent.tag, [self._bytes_of(rows), *trace], self._deadline)
        except TransportError as error:
            raise self._unavailable(error) from error
        self._sent[sent.tag] = sent
        self.batches += 1
        if began_ns:
            self._spans.end(ROWS_OUT, began_ns, layer=layer, micro_batch=micro_batch, rows=rows.shape[0])
        return sent

    def _bytes_of(self, rows: Tensor) -> memoryview:
        """A step sends the same tensor in each layer, with other numbers in it."""
        if rows is not self._part[0]:
            whole = rows.contiguous()
            part = tensor_bytes(whole)
            if whole is not rows or not rows.is_cpu:
                return part  # a copy of the numbers of now
            self._part = rows, part
        return self._part[1]

    def finish(self, sent: object) -> Tensor:
        """The combined rows [T, D] for what ``start`` sent; valid until the next call. Raises MoEUnavailable."""
        assert isinstance(sent, RowsSent)
        self._take_back()
        while sent.tag not in self._early:
            try:
                came, rows = self._receive(sent.tag)
            except TransportError as error:
                raise self._unavailable(error) from error
            if came is sent:
                return rows
            self._early[came.tag] = _Early(rows, self.wire.keep())
        rows, self._let_go = self._early.pop(sent.tag)
        return rows

    def _receive(self, wanted: FrameTag) -> tuple[RowsSent, Tensor]:
        """The next answer, to whatever was sent, while ``wanted`` is waited for. Raises MoEUnavailable for a failure
        that is told."""
        self._call_when_sent()
        was_here = self.wire.ready()
        began_ns = self._spans.begin()
        frame = self._wait()
        if began_ns:
            self._spans.end(WAIT, began_ns, layer=wanted.layer, micro_batch=wanted.micro_batch)
        if frame.kind == Kind.FAILED:
            raise MoEUnavailable(failure_text(frame))
        sent = self._sent.pop(frame.tag, None)
        if frame.kind != Kind.ROWS_DONE or sent is None:
            raise ProtocolError(f"kind {frame.kind}, {frame.tag}; expected ROWS_DONE for {[*self._sent]}")
        part, told = expect_parts(frame, 2)
        times = times_from(told)
        trip_s = times.router_s if was_here else time.perf_counter() - sent.began
        self.experts_s += times.experts_s
        self.transfer_s += max(0.0, trip_s - times.experts_s) / 2
        rows = tensor_from(part, self._dtype, self._d_model, self._device)
        if rows.shape[0] != sent.n_rows:
            raise MoEUnavailable(f"router {self.wire.peer}: {rows.shape[0]} rows came back of {sent.n_rows}")
        return sent, rows

    def _call_when_sent(self) -> None:
        if self.when_sent is not None:
            began = time.monotonic()
            work, self.when_sent = self.when_sent, None
            work()
            self._deadline += time.monotonic() - began

    def _wait(self) -> Frame:
        began = time.perf_counter()
        try:
            return self.wire.recv(self._deadline)
        finally:
            self.waited_s += time.perf_counter() - began

    def _take_back(self) -> None:
        if self._let_go is not None:
            self._let_go()
            self._let_go = None

    def _forget(self) -> None:
        """Nothing is under way any more."""
        self._sent.clear()
        self._take_back()
        for early in self._early.values():
            early.let_go()
        self._early.clear()

    def _unavailable(self, error: TransportError) -> MoEUnavailable:
        return MoEUnavailable(f"router {self.wire.peer}: {type(error).__name__}: {error}")
