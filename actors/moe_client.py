"""An attention shard's view of the experts: one wire to its router."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.messages import Kind, expect_parts, failure_text, tensor_bytes, tensor_from
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


@dataclass(frozen=True)
class RowsSent:
    """Rows of one layer that are on their way; only ``finish`` takes it."""

    tag: FrameTag
    count: int


class MoEClient:
    """Implements ``actors.model.decoder.MoE`` over the wire to the router.

    ``batches`` were sent in this step, and ``waited_s`` seconds of it nothing was done but wait for their answers. On a
    GPU ``start`` waits for the device, which has to have the rows, and ``finish`` may wait while the device still
    computes the shared expert: what is left of a step is then the attention's part without the shared experts.
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
        self._device = device
        self._dtype = dtype
        self._d_model = d_model
        self._timeout_s = step_timeout_s
        self._step = 0
        self._deadline = 0.0
        self._traced_layers = traced_layers(moe_layers)
        self._trace: list[Buffer] = []
        self._spans = spans or SpanLog()

    def begin_step(self, traceparent: str = "") -> None:
        """A new step: answers that belong to an earlier one are stale from now on.

        ``traceparent``: of the step's span, if it is traced.
        """
        self._step += 1
        self.batches, self.waited_s = 0, 0.0
        self._trace = [traceparent.encode()] if traceparent else []
        self._deadline = time.monotonic() + self._timeout_s
        self.wire.fence(FrameTag(step=self._step))

    def abandon(self) -> None:
        """The step is void: what still comes for it is stale."""
        self.wire.fence(FrameTag(step=self._step + 1))

    def start(self, layer: int, rows: Tensor) -> RowsSent:
        """Send ``rows`` [T, D] of ``layer`` to the router. Raises MoEUnavailable."""
        tag = FrameTag(step=self._step, layer=layer)
        trace = self._trace if layer in self._traced_layers else []
        began_ns = self._spans.begin()
        try:
            self.wire.send(Kind.ROWS, tag, [tensor_bytes(rows.contiguous()), *trace], self._deadline)
        except TransportError as error:
            raise MoEUnavailable(f"router {self.wire.peer}: {type(error).__name__}: {error}") from error
        self.batches += 1
        if began_ns:
            self._spans.end(ROWS_OUT, began_ns, layer=layer, micro_batch=tag.micro_batch, rows=rows.shape[0])
        return RowsSent(tag, rows.shape[0])

    def finish(self, sent: object) -> Tensor:
        """The combined rows [T, D] for what ``start`` sent; valid until the next call. Raises MoEUnavailable."""
        assert isinstance(sent, RowsSent)
        try:
            began_ns = self._spans.begin()
            frame = self._wait()
            if began_ns:
                self._spans.end(WAIT, began_ns, layer=sent.tag.layer, micro_batch=sent.tag.micro_batch)
            if frame.kind == Kind.FAILED:
                raise MoEUnavailable(failure_text(frame))
            if frame.kind != Kind.ROWS_DONE or frame.tag != sent.tag:
                raise ProtocolError(f"kind {frame.kind}, {frame.tag}; expected ROWS_DONE for {sent.tag}")
            (part,) = expect_parts(frame, 1)
            rows = tensor_from(part, self._dtype, self._d_model, self._device)
        except TransportError as error:
            raise MoEUnavailable(f"router {self.wire.peer}: {type(error).__name__}: {error}") from error
        if rows.shape[0] != sent.count:
            raise MoEUnavailable(f"router {self.wire.peer}: {rows.shape[0]} rows came back of {sent.count}")
        return rows

    def _wait(self) -> Frame:
        began = time.perf_counter()
        try:
            return self.wire.recv(self._deadline)
        finally:
            self.waited_s += time.perf_counter() - began
