"""An attention shard's view of the experts: one wire to its router."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.messages import Kind, expect_parts, failure_text, tensor_bytes, tensor_from
from actors.transport.base import FrameTag, ProtocolError, TransportError, Wire


class MoEUnavailable(RuntimeError):
    """The routed experts' part of a layer could not be computed; the step is void, nothing of it was published."""


@dataclass(frozen=True)
class RowsSent:
    """Rows of one layer that are on their way; only ``finish`` takes it."""

    tag: FrameTag
    count: int


class MoEClient:
    """Implements ``actors.model.decoder.MoE`` over the wire to the router."""

    def __init__(
        self, wire: Wire, dtype: torch.dtype, device: torch.device, d_model: int, step_timeout_s: float
    ) -> None:
        self.wire = wire
        self._device = device
        self._dtype = dtype
        self._d_model = d_model
        self._timeout_s = step_timeout_s
        self._step = 0
        self._deadline = 0.0

    def begin_step(self) -> None:
        """A new step: answers that belong to an earlier one are stale from now on."""
        self._step += 1
        self._deadline = time.monotonic() + self._timeout_s
        self.wire.fence(FrameTag(step=self._step))

    def abandon(self) -> None:
        """The step is void: what still comes for it is stale."""
        self.wire.fence(FrameTag(step=self._step + 1))

    def start(self, layer: int, rows: Tensor) -> RowsSent:
        """Send ``rows`` [T, D] of ``layer`` to the router. Raises MoEUnavailable."""
        tag = FrameTag(step=self._step, layer=layer)
        try:
            self.wire.send(Kind.ROWS, tag, [tensor_bytes(rows.contiguous())], self._deadline)
        except TransportError as error:
            raise MoEUnavailable(f"router {self.wire.peer}: {type(error).__name__}: {error}") from error
        return RowsSent(tag, rows.shape[0])

    def finish(self, sent: object) -> Tensor:
        """The combined rows [T, D] for what ``start`` sent; valid until the next call. Raises MoEUnavailable."""
        assert isinstance(sent, RowsSent)
        try:
            frame = self.wire.recv(self._deadline)
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
