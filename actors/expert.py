"""ExpertShard: holds the weights of some (layer, expert) pairs and computes them for whoever sends rows.

It keeps no state of any request: a DISPATCH frame comes, a RESULTS frame with the same tag goes back. So a shard may
be added, copied, or killed while streams run.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from actors.batch_spans import BatchSpan
from actors.express.shard import Done, ShardExpress
from actors.frames import Kind, on_host
from actors.groups import Groups
from actors.log_fields import mark, trace_ids
from actors.loop import LoopThread
from actors.messages import encode_seconds, indices_from, tensor_from, tensor_part, traced_parts
from actors.model.experts import ExpertBank
from actors.model.families import load_spec
from actors.model.heap import trim
from actors.model.parallel import READERS
from actors.model.weights import Checkpoint
from actors.settings import ModelSettings
from actors.span_log import Recorded, SpanLog
from actors.stats import ExpertStats, traffic
from actors.stopwatch import Stopwatch
from actors.trace_context import Trace
from actors.transport.base import Address, Buffer, EndpointFactory, Frame, FrameTag, Part, PeerGone, Wire
from actors.transport.nccl_group import GroupPlan
from actors.transport.nccl_join import Lobby
from placement.expert_map import Expert

log = logging.getLogger(__name__)


class ExpertShard(Recorded):
    """One expert shard. After ``listen`` it serves every wire that connects, until ``stop``, with what ``load`` and
    ``keep`` have given it: both may be called while it serves. Over NCCL a wire is served from ``join`` on."""

    def __init__(self, name: str, model: ModelSettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._model = model
        self._spec = load_spec(model.path)
        self._bank = ExpertBank({}, self._spec.d_model, model.torch_dtype, model.row_block)
        self._changing = threading.Lock()
        self._checkpoint: Checkpoint | None = None
        self._epoch = 0
        self._wanted_epoch = 0  # of the latest load
        self._loaded_bytes = 0
        self._rows = self._pairs = 0
        self._busy = Stopwatch(model.torch_device)
        self._spans = SpanLog()
        self._express = ShardExpress.made(model, self._spec.d_model, self._spans)
        self._loop = LoopThread(name, self._on_frame, self._on_gone, threads=model.thread_count, express=self._express)
        self._lobby = Lobby()
        self._groups = Groups(name, model.torch_device, model.step_timeout_s)
        self._endpoint = make_endpoint(name, self._lobby.park if model.nccl else self._loop.add)

    def listen(self) -> Address:
        """Start to serve. Returns where routers connect."""
        self._loop.start()
        return self._endpoint.address

    def load(self, epoch: int, experts: Iterable[Expert]) -> int:
        """Read the weights of those of ``experts`` that are not here yet, for the map of ``epoch``.

        Nothing is taken away: maps of other epochs go on being served, for the sake of which one thread reads instead
        of several. Returns how many were read.
        """
        self._wanted_epoch = max(self._wanted_epoch, epoch)
        with self._changing:
            missing = set(experts) - self._bank.experts
            if missing:
                self._serve(self._bank.with_(self._read(missing)))
            self._epoch = epoch
        return len(missing)

    def join(self, plan: GroupPlan, timeout_s: float) -> None:
        """Form the group of ``plan`` with its other members, and serve its routers. Errors: TransportError."""
        for wire in self._groups.join_as_shard(plan, self._lobby, timeout_s).wires.values():
            self._loop.add(wire)

    def leave(self, epoch: int) -> None:
        """The group of ``epoch`` is over, or shall not form: no router works by it. Idempotent."""
        self._groups.leave(epoch)

    def keep(self, epoch: int, experts: Iterable[Expert]) -> None:
        """Let go of everything but ``experts``: maps up to ``epoch`` need no more. Ignored when a ``load`` for a later
        one has come meanwhile: calls may overtake each other."""
        with self._changing:
            if epoch >= self._wanted_epoch:
                before = len(self._bank.experts)
                self._serve(self._bank.only(experts))
                self._epoch = epoch
                if len(self._bank.experts) < before:
                    trim()

    def _serve(self, bank: ExpertBank) -> None:
        self._bank = bank
        if self._express is not None:
            self._express.install(bank)

    def loaded_bytes(self) -> int:
        """Bytes read so far, for a progress bar."""
        return self._loaded_bytes

    def stats(self) -> ExpertStats:
        """What this shard holds and did. Raises RuntimeError when its data plane has failed."""
        self._loop.check()
        bank, busy, express = self._bank, self._busy.measured, self._express.done() if self._express else Done()
        return ExpertStats(
            pid=os.getpid(),
            epoch=self._epoch,
            experts=len(bank.experts),
            weight_bytes=bank.nbytes,
            rows=self._rows + express.rows,
            pairs=self._pairs + express.pairs,
            busy_s=busy.seconds + express.seconds,
            batches=busy.blocks + express.batches,
            bytes_sent=self._loop.bytes_sent(),
            wires=traffic(self._loop.wires()),
        )

    def start_spans(self, limit_steps: int = 0, limit_s: float = math.inf) -> None:
        """See ``SpanLog.start``. What is recorded goes the general way."""
        super().start_spans(limit_steps, limit_s)
        self._loop.wake()

    def stop(self) -> None:
        """Close every wire and end the loop thread. Idempotent."""
        self._endpoint.close()
        self._lobby.close()
        self._loop.stop()
        self._groups.close()

    def _read(self, experts: Iterable[Expert]) -> ExpertBank:
        with self._opened() as checkpoint:
            return ExpertBank.load(
                self._spec,
                checkpoint,
                experts,
                dtype=self._model.torch_dtype,
                row_block=self._model.row_block,
                progress=self._count,
                device=self._model.torch_device,
                quantization=self._model.quant_kind,
                readers=1 if self._bank.experts else READERS,
            )

    def _opened(self) -> Checkpoint:
        """The same as for the load before, unless its files have changed: parsing their headers would hold up whoever
        is served."""
        if self._checkpoint is None or not self._checkpoint.unchanged():
            self._checkpoint = Checkpoint(self._model.path, self._model.check_weights, self._model.map_weights)
        return self._checkpoint

    def _count(self, read: int) -> None:
        self._loaded_bytes += read

    def _on_frame(self, wire: Wire, frame: Frame) -> None:
        deadline = time.monotonic() + self._model.step_timeout_s
        began_ns, before = self._spans.begin(), self._rows
        try:
            out = self._compute(frame)
        except Exception as error:  # whatever a request brings, it ends that request alone
            log.exception("a request of %s cannot be computed", wire.peer)
            text = f"expert shard {self.name}: {type(error).__name__}: {error}"
            told: list[Buffer] = [text.encode()]
            wire.send(Kind.FAILED, frame.tag, told, deadline)
            return
        took = encode_seconds(self._busy.last_s)
        if began_ns:
            self._note_batch(began_ns, frame.tag, self._rows - before, out.shape[0])
        wire.send(Kind.RESULTS, frame.tag, [tensor_part(out, wire), took], deadline)

    def _note_batch(self, began_ns: int, tag: FrameTag, rows: int, pairs: int) -> None:
        """A recorded batch is waited for: a GPU may just have been told to compute it."""
        device = self._model.torch_device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self._spans.end(
            "compute",
            began_ns,
            layer=tag.layer,
            micro_batch=tag.micro_batch,
            rows=rows,
            pairs=pairs,
            epoch=tag.epoch,
            batch=tag.step,
        )

    def _compute(self, frame: Frame) -> Tensor:
        """Unweighted outputs [P, D] of a DISPATCH frame."""
        if frame.kind != Kind.DISPATCH:
            raise ValueError(f"frame kind {frame.kind}; an expert shard takes only DISPATCH ({Kind.DISPATCH})")
        parts, trace = traced_parts(frame, 3)
        if trace is None:
            return self._forward(frame.tag.layer, *parts)
        return self._traced(trace, frame.tag, *parts)

    def _forward(self, layer: int, rows_part: Part, pair_row: Part, pair_expert: Part) -> Tensor:
        device = self._model.torch_device
        rows = tensor_from(rows_part, self._model.torch_dtype, self._spec.d_model, device)
        pairs, experts = indices_from(pair_row, device), indices_from(pair_expert, device)
        with self._busy.running():
            out = self._bank.forward(layer, rows, pairs, experts)
        self._rows += rows.shape[0]
        self._pairs += pairs.shape[0]
        return out

    def _traced(self, trace: Trace, tag: FrameTag, rows_part: Part, pair_row: Part, pair_expert: Part) -> Tensor:
        span = BatchSpan("experts", self.name, trace, tag.layer, time.time_ns())
        before = self._rows
        try:
            out = self._forward(tag.layer, rows_part, pair_row, pair_expert)
        except Exception as error:
            span.end(type(error).__name__, epoch=tag.epoch)
            mark(error, **trace_ids(span.traceparent))
            raise
        experts = np.unique(np.frombuffer(on_host(pair_expert), np.int32)).size
        span.end(epoch=tag.epoch, rows=self._rows - before, pairs=out.shape[0], experts=experts)
        return out

    def _on_gone(self, wire: Wire, error: PeerGone) -> None:
        """A router went away: nothing of it is kept here."""
