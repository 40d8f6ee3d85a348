"""Dispatcher: the router's data plane. Sends each batch's rows to the shards of the map, combines what comes back.

The main path: ``dispatch`` (a batch came from an attention shard), ``on_results``, ``combine``. A shard that is lost
costs no batch: what it owed is sent again, to another replica at once, or to whoever holds its experts when the next
map is committed, within the batch's deadline. Never is an expert left out.

Everything here runs in the router's loop thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.batch_spans import DispatchSpan
from actors.dispatch import NOBODY, ShardRows, dispatch_rows, split_rows
from actors.frames import Kind, expect_parts
from actors.messages import (
    BatchTimes,
    encode_times,
    failure_text,
    rows_part,
    seconds_from,
    tensor_bytes,
    tensor_from,
    tensor_part,
)
from actors.model.combine import Piece, combine_pieces
from actors.routes import ExpertRoutes
from actors.span_log import SpanLog
from actors.transport.base import Buffer, Frame, FrameTag, Medium, Part, PeerGone, ProtocolError, Wire, WireTimeout
from actors.transport.blocks import Block

log = logging.getLogger(__name__)

Drop = Callable[[Wire, PeerGone], None]

_NO_SLOTS = np.empty(0, np.int64)


@dataclass(eq=False, slots=True)
class DispatchHandle:
    """A batch whose rows are out at the expert shards. Made by ``dispatch``; only ``combine`` takes it.

    ``rows`` [T, D], in host memory also as ``bytes``, and ``chosen`` int64[T, K] are there to send them again;
    ``weight`` float32 [T, K]. ``owed``: by attempt, the shard's name and what it still has to answer; ``came``: what
    has been answered. Rows and answers lie in the frames that they came in; ``kept``: lets go of those. ``stranded``
    int64[S]: slots that nobody can compute before the next map. ``refused``: shards that answered with an error.
    ``experts_s``: the longest that a shard computed so far. ``span`` if the batch is traced. ``began_ns``: see
    ``SpanLog.begin``.
    """

    number: int
    source: Wire
    tag: FrameTag
    rows: Tensor
    bytes: memoryview | None
    chosen: NDArray[np.int64]
    weight: Tensor
    began: float
    deadline: float
    kept: list[Callable[[], None]]
    span: DispatchSpan | None = None
    came: list[Piece] = field(default_factory=list)
    owed: dict[int, tuple[str, ShardRows]] = field(default_factory=dict)
    stranded: NDArray[np.int64] = field(default_factory=lambda: _NO_SLOTS)
    refused: dict[str, str] = field(default_factory=dict)
    attempts: int = 0
    experts_s: float = 0.0
    began_ns: int = 0

    @property
    def complete(self) -> bool:
        """Every result has come."""
        return not self.owed and not self.stranded.size


class Completed(NamedTuple):
    """``batches`` were completed: ``dispatch_s`` seconds from sending one out to its last result, ``combine_s`` seconds
    of combining, over all of them. On a GPU results may still be on their way into place when the last one is here;
    that counts as combining, which ends with the combined rows in host memory."""

    batches: int = 0
    dispatch_s: float = 0.0
    combine_s: float = 0.0

    def with_(self, other: Completed) -> Completed:
        """Both together."""
        return Completed(*map(add, self, other))


class Dispatcher:
    """Batches in flight: of each source any number of one step, which are its micro-batches.

    ``drop(wire, error)`` takes a dead wire out of the loop, which then reports its loss.

    ``completed``: what those that are over took; a new one after each, so that who reads it sees whole batches.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        d_model: int,
        last_layer: int,
        timeout_s: float,
        drop: Drop,
        on_loss: Callable[[], None] = lambda: None,
        spans: SpanLog | None = None,
    ) -> None:
        """``last_layer``: the MoE layer with whose micro-batch 0 a step ends. Rows are kept and combined on ``device``.
        ``on_loss`` is called whenever a shard of the map in force is lost."""
        self.name = name
        self.routes: ExpertRoutes | None = None
        self.rows_per_shard: dict[str, int] = {}
        self.expert_rows: dict[int, NDArray[np.int64]] = {}
        self.reroutes = 0
        self.longest_wait_s = 0.0
        self.completed = Completed()
        self._dtype = dtype
        self._device = device
        self._d_model = d_model
        self._last_layer = last_layer
        self._timeout_s = timeout_s
        self._drop = drop
        self._on_loss = on_loss
        self._pending: dict[int, DispatchHandle] = {}
        self._mid_step: dict[Wire, float] = {}  # sources inside a step, and until when to believe it
        self._void: dict[Wire, int] = {}  # the latest step of a source that has failed
        self.number = 0  # of the latest batch
        self._row_bytes = d_model * dtype.itemsize
        self._combined = Block(0)
        self._spans = spans or SpanLog()

    def may_switch(self, now: float) -> bool:
        """True at a step boundary of every source, and while some batch waits for just that: another map."""
        if any(handle.stranded.size for handle in self._pending.values()):
            return True
        self._mid_step = {wire: until for wire, until in self._mid_step.items() if until > now}
        return not self._pending and not self._mid_step and (self.routes is None or self.routes.quiet)

    @property
    def next_deadline(self) -> float:
        """Absolute monotonic seconds of the first batch's deadline; infinity without one."""
        return min((handle.deadline for handle in self._pending.values()), default=float("inf"))

    # -- batches --------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        source: Wire,
        tag: FrameTag,
        rows: Tensor,
        chosen: Tensor,
        weight: Tensor,
        span: DispatchSpan | None = None,
    ) -> None:
        """Send each row of ``rows`` [T, D] once to each shard that computes any of its experts ``chosen`` int64
        [T, K]; ``source`` gets the rows combined with ``weight`` float32 [T, K] when all have answered, or a FAILED.

        ``rows`` may lie in the frame that ``source`` received last, which is kept. ``span`` ends with the batch. A
        batch of a step that has failed already is ignored: it was on its way.
        """
        if self._void.get(source) == tag.step:
            if span is not None:
                span.over(self.routes.epoch if self.routes else 0, DispatchSpan.ABANDONED)
            return
        now, began_ns = time.monotonic(), self._spans.begin()
        self._void.pop(source, None)
        self._forget_before(source, tag.step)
        over = tag.layer == self._last_layer and tag.micro_batch == 0  # with the answers to what is in flight
        self.note_step(source, None if over else now + self._timeout_s)
        self.number += 1
        handle = DispatchHandle(
            self.number,
            source,
            tag,
            rows,
            tensor_bytes(rows) if rows.is_cpu else None,
            chosen.cpu().numpy(),
            weight,
            now,
            now + self._timeout_s,
            [source.keep()],
            span,
            began_ns=began_ns,
        )
        self._pending[handle.number] = handle
        self._send_all(handle)
        self._finish_if_complete(handle)  # at once, if there are no rows

    @property
    def steady(self) -> bool:
        """No batch is in flight, and no source goes on with a step that has failed: see ``actors/express``."""
        return not self._pending and not self._void

    def take_over(self, handle: DispatchHandle) -> None:
        """A batch that somebody else has sent out. It owes something."""
        self._pending[handle.number] = handle

    def note_step(self, source: Wire, until: float | None) -> None:
        """``source`` is inside a step, which is believed until then (monotonic); None: its step is as good as over."""
        if until is None:
            self._mid_step.pop(source, None)
        else:
            self._mid_step[source] = until

    def load_of(self, layer: int) -> NDArray[np.int64]:
        """int64[E] of ``expert_rows``, to count in."""
        load = self.expert_rows.get(layer)
        if load is None:
            assert self.routes is not None
            load = self.expert_rows[layer] = np.zeros(self.routes.map.n_experts, np.int64)
        return load

    def combine(self, handle: DispatchHandle) -> memoryview:
        """Weighted sum [T, D] of the results, in the order of k, as bytes that are good until the next call. Every
        shard must have answered."""
        assert handle.complete, "a shard still owes its results"
        size = len(handle.chosen) * self._row_bytes
        if self._combined.size < size:
            self._combined = Block(size)
        combined = self._combined.view[:size]
        combine_pieces(handle.came, self._dtype, handle.weight, combined)
        return combined

    def on_results(self, wire: Wire, frame: Frame) -> None:
        """A shard has answered. Raises ProtocolError for what it was not asked for."""
        if self.routes is not None and self.routes.wires.get(wire.peer) is wire:
            self.routes.answered += 1
        handle = self._pending.get(frame.tag.step)
        shard, share = handle.owed.get(frame.tag.attempt, ("", None)) if handle else ("", None)
        if handle is None or share is None or shard != wire.peer:
            return  # late: the batch was given up, or these rows were sent to somebody else meanwhile
        if frame.kind == Kind.FAILED:
            del handle.owed[frame.tag.attempt]
            self._refused(handle, shard, failure_text(frame), share.pair_slot)
            return
        part, seconds = expect_parts(frame, 2)
        count = share.pair_slot.size
        if len(part) != count * self._row_bytes:
            raise ProtocolError(f"expert shard {shard} sent {len(part)} bytes, owed are {count} x {self._row_bytes}")
        handle.experts_s = max(handle.experts_s, seconds_from(seconds))
        del handle.owed[frame.tag.attempt]
        handle.came.append(Piece(share.pair_slot, self._placed(part)))
        handle.kept.append(wire.keep())
        self._finish_if_complete(handle)

    def fail(self, source: Wire, tag: FrameTag, reason: str) -> None:
        """Tell an attention shard that this batch of its step cannot be computed: the step is void, and with it the
        other batches of it."""
        self._void[source] = tag.step
        self._forget_before(source, tag.step + 1)
        self._mid_step.pop(source, None)
        self._answer(source, Kind.FAILED, tag, [reason.encode()], time.monotonic() + self._timeout_s)

    def end_late(self, now: float) -> None:
        """Give up the batches whose deadline has passed."""
        for handle in list(self._pending.values()):
            if handle.deadline <= now:
                late = sorted({shard for shard, _ in handle.owed.values()})
                lost = sorted(self.routes.lost) if self.routes else []
                self._give_up(
                    handle,
                    f"no answer within {self._timeout_s:g} s from {', '.join(late) or 'anybody'}"
                    + (f"; lost: {', '.join(lost)}" if lost else ""),
                )

    # -- shards and maps ------------------------------------------------------------------------------------------

    def install(self, routes: ExpertRoutes) -> None:
        """Work by another map from now on; batches in flight are sent again by it."""
        self.routes = routes
        for wire in routes.wires.values():
            wire.fence(FrameTag(epoch=routes.epoch))
        for handle in list(self._pending.values()):
            handle.refused.clear()
            self._resend(handle, list(handle.owed))

    def lose_shard(self, shard: str) -> None:
        """Its wire is gone: what it owed is sent to others. So is what others owed that went with it."""
        if self.routes is None or shard not in self.routes.wires:
            return
        self.routes.lose(shard)
        self._on_loss()
        gone = self.routes.lost
        for handle in list(self._pending.values()):
            owed = [attempt for attempt, (owner, _) in handle.owed.items() if owner in gone]
            if owed:
                self._resend(handle, owed)

    def lose_source(self, source: Wire) -> None:
        """An attention shard is gone: nobody waits for its batches."""
        self._mid_step.pop(source, None)
        self._void.pop(source, None)
        for handle in [h for h in self._pending.values() if h.source is source]:
            self._release(handle, DispatchSpan.ABANDONED)

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _send_all(self, handle: DispatchHandle) -> None:
        """Send all pairs of a new batch, and count them."""
        routes, layer = self.routes, handle.tag.layer
        assert routes is not None
        owners = routes.owners(layer)
        shares = dispatch_rows(handle.chosen, owners, handle.number, self.load_of(layer))
        if sum([share.pair_slot.size for share in shares]) < handle.chosen.size:
            self._strand(handle, np.flatnonzero(owners.of(handle.chosen.reshape(-1), handle.number) == NOBODY))
        self._send_shares(handle, shares)

    def _send(self, handle: DispatchHandle, slots: NDArray[np.int64]) -> None:
        """Send the pairs at ``slots``, as others were sent before."""
        assert self.routes is not None
        owners = self.routes.owners(handle.tag.layer, handle.refused)
        owner = owners.of(handle.chosen.reshape(-1)[slots], handle.number)
        if (owner == NOBODY).any():
            self._strand(handle, slots[owner == NOBODY])
        self._send_shares(handle, split_rows(handle.chosen, slots, owner))

    def _strand(self, handle: DispatchHandle, slots: NDArray[np.int64]) -> None:
        handle.stranded = np.sort(np.concatenate([handle.stranded, slots]))
        log.warning("%s: %d pairs wait for a shard that holds their experts", self.name, handle.stranded.size)

    def _send_shares(self, handle: DispatchHandle, shares: Sequence[ShardRows]) -> None:
        """A shard that turns out to be dead is lost, and its share sent elsewhere."""
        routes = self.routes
        assert routes is not None
        with routes.batch():
            for share in shares:
                self._send_share(handle, routes, share)

    def _send_share(self, handle: DispatchHandle, routes: ExpertRoutes, share: ShardRows) -> None:
        name, wire = routes.names[share.shard], routes.wire(share.shard)
        handle.attempts += 1
        handle.owed[handle.attempts] = (name, share)
        tag = FrameTag(routes.epoch, handle.number, handle.tag.micro_batch, handle.tag.layer, handle.attempts)
        parts = [_picked(handle, share, wire), share.pair_row.data, share.pair_expert.data]
        if handle.span is not None:
            handle.span.asked(name)
            parts += handle.span.parts
        try:
            wire.ask(Kind.DISPATCH, tag, parts, share.pair_slot.size * self._row_bytes, handle.deadline)
        except (PeerGone, WireTimeout) as error:
            self._drop(wire, PeerGone(str(error)))
            self.lose_shard(name)  # again: this share may have been added after its loss was reported
            return
        routes.asked += 1
        self.rows_per_shard[name] = self.rows_per_shard.get(name, 0) + share.rows.size

    def _resend(self, handle: DispatchHandle, attempts: list[int]) -> None:
        """Send again what these attempts owe, and what was stranded."""
        slots = [handle.owed.pop(attempt)[1].pair_slot for attempt in attempts]
        again, handle.stranded = np.sort(np.concatenate([*slots, handle.stranded])), _NO_SLOTS
        if again.size:
            self._send_again(handle, again)

    def _refused(self, handle: DispatchHandle, shard: str, reason: str, slots: NDArray[np.int64]) -> None:
        """A shard could not compute its share: another replica may; without one the batch has failed."""
        handle.refused[shard] = reason
        assert self.routes is not None
        experts = handle.chosen.reshape(-1)[slots]
        if (self.routes.owners(handle.tag.layer, handle.refused).of(experts, 0) == NOBODY).any():
            self._give_up(handle, reason)
            return
        self._send_again(handle, slots)

    def _send_again(self, handle: DispatchHandle, slots: NDArray[np.int64]) -> None:
        self.reroutes += 1
        if handle.span is not None:
            handle.span.rerouted()
        self._send(handle, slots)

    def _finish_if_complete(self, handle: DispatchHandle) -> None:
        if not handle.complete or handle.number not in self._pending:
            return
        gathered, gathered_ns = time.monotonic(), self._spans.begin()
        if handle.began_ns:
            self._note_experts(handle)
        combined = self.combine(handle)
        over = time.monotonic()
        self.longest_wait_s = max(self.longest_wait_s, gathered - handle.began)
        done = self.completed
        self.completed = Completed(
            done.batches + 1,
            done.dispatch_s + gathered - handle.began,
            done.combine_s + over - gathered,
        )
        if gathered_ns:
            self._spans.end("combine", gathered_ns, layer=handle.tag.layer, micro_batch=handle.tag.micro_batch)
        self._release(handle)
        times = encode_times(BatchTimes(handle.experts_s, over - handle.began))
        self._answer(handle.source, Kind.ROWS_DONE, handle.tag, [combined, times], handle.deadline)

    def _note_experts(self, handle: DispatchHandle) -> None:
        """Batches overlap, but for those of one source and micro-batch: each of these has a lane."""
        self._spans.end(
            "experts",
            handle.began_ns,
            f"{handle.source.peer}, micro-batch {handle.tag.micro_batch}",
            layer=handle.tag.layer,
            micro_batch=handle.tag.micro_batch,
            rows=handle.rows.shape[0],
            batch=handle.number,
        )

    def _give_up(self, handle: DispatchHandle, reason: str) -> None:
        """The batch cannot be completed: its attention shard is told, late answers will be ignored."""
        if handle.number in self._pending:  # else it went with an earlier one of its step, or with its source
            self._release(handle, DispatchSpan.FAILED)
            self.fail(handle.source, handle.tag, reason)

    def _release(self, handle: DispatchHandle, error: str = "") -> None:
        del self._pending[handle.number]
        if handle.span is not None:
            handle.span.over(self.routes.epoch if self.routes else 0, error)
        for let_go in handle.kept:
            let_go()

    def _forget_before(self, source: Wire, step: int) -> None:
        """A source that is in a new step has given up what it asked for in earlier ones."""
        for handle in [h for h in self._pending.values() if h.source is source and h.tag.step < step]:
            self._release(handle, DispatchSpan.ABANDONED)

    def _answer(self, source: Wire, kind: Kind, tag: FrameTag, parts: Sequence[Buffer], deadline: float) -> None:
        try:
            source.send(kind, tag, parts, deadline)
        except (PeerGone, WireTimeout) as error:
            self._drop(source, PeerGone(str(error)))

    def _placed(self, part: Part) -> Tensor | memoryview:
        """Results where they are combined."""
        if self._device.type == "cpu":
            return part
        return tensor_from(part, self._dtype, self._d_model, self._device)


def _picked(handle: DispatchHandle, share: ShardRows, wire: Wire) -> Buffer | Tensor:
    """The rows of a share as a part of a frame for ``wire``."""
    if share.rows.size < handle.rows.shape[0]:
        return rows_part(handle.rows, share.rows, wire)
    if handle.bytes is None or wire.medium is Medium.NCCL:
        return tensor_part(handle.rows, wire)
    return handle.bytes
