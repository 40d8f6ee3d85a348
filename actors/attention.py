"""AttentionShard: keeps the KV cache, forms the steps, runs the layer loop, samples, and sends tokens to gateways.

The main path is ``_step``: schedule → forward (which asks the router for each MoE layer) → sample → publish. It runs
in the data-plane thread. Requests and aborts come from other threads and take effect when the next step is formed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from actors.engine.kv_blocks import BlockPool
from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.engine.scheduler import NeverFits, QueueFull, Scheduler, SchedulerLimits, StepPlan
from actors.log_fields import fields
from actors.loop import LoopThread
from actors.messages import Kind, encode_tokens
from actors.model.decoder import AttentionModel
from actors.model.families import load_spec
from actors.model.kv_cache import KVCache
from actors.model.weights import Checkpoint
from actors.moe_client import MoEClient, MoEUnavailable
from actors.observer import ShardObserver
from actors.settings import EngineSettings, ModelSettings
from actors.stats import WireTraffic, traffic
from actors.step_batch import sample_plan, step_batch
from actors.timeline import Instant
from actors.transport.base import (
    Address,
    EndpointFactory,
    Frame,
    FrameTag,
    Medium,
    PeerGone,
    ProtocolError,
    Wire,
    WireTimeout,
)

log = logging.getLogger(__name__)

_GATEWAY_WAIT_S = 1.0


class NoMemory(RuntimeError):
    """The node, or its GPU, does not have the memory that the configuration gives to the KV cache."""


@dataclass(frozen=True)
class Refusal:
    """Why a request was not admitted. ``field`` is set when the request itself is at fault."""

    kind: str
    message: str
    field: str = ""
    retry_after_s: float = 0.0

    INVALID = "invalid"
    FULL = "full"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class AttentionStats:
    """``tokens`` were published since the start, in ``busy_s`` seconds of steps. For ``experts_wait_s`` of these only
    experts were waited for: they were sent ``moe_batches``, one per step and MoE layer (see :class:`MoEClient`).
    ``bytes_sent``: since the start, by medium."""

    pid: int
    weight_bytes: int
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_free: int
    steps: int
    tokens: int
    busy_s: float
    experts_wait_s: float
    moe_batches: int
    bytes_sent: dict[str, int]
    wires: tuple[WireTraffic, ...]


class _Work(NamedTuple):
    """What the steps so far took; a new one after each, so that who reads it sees whole steps."""

    steps: int = 0
    busy_s: float = 0.0
    experts_wait_s: float = 0.0
    moe_batches: int = 0


class AttentionShard:
    """One data-parallel attention replica. ``load``, ``connect`` to its router; gateways connect to it."""

    def __init__(self, name: str, model: ModelSettings, engine: EngineSettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._settings = model
        self._spec = load_spec(model.path)
        self._cache: KVCache | None = None
        self._model: AttentionModel | None = None
        self._moe: MoEClient | None = None
        self._loaded_bytes = 0
        self._tokens = 0
        self._work = _Work()
        self._kv_bytes = engine.kv_bytes
        block_bytes = engine.block_size * KVCache.bytes_per_token(self._spec, model.torch_dtype)
        self._blocks = BlockPool(engine.kv_bytes // block_bytes, engine.block_size)
        limits = SchedulerLimits(engine.context_length, engine.max_running, engine.token_budget, engine.max_waiting)
        self._scheduler = Scheduler(limits, self._blocks)
        self._lock = threading.Lock()  # guards the scheduler: requests come from other threads than the steps
        self._owner: dict[str, str] = {}
        self._observer = ShardObserver(name)
        self._gateways: dict[str, Wire] = {}
        self._gateway_came = threading.Condition(self._lock)
        self._loop = LoopThread(
            name, self._on_frame, self._on_gone, model.thread_count, self._next_deadline, self._step
        )
        self._endpoint = make_endpoint(name, self._on_wire)

    # -- control (from other threads) ---------------------------------------------------------------------------

    def load(self) -> Address:
        """Read this shard's weights, allocate the KV cache. Returns where gateways connect."""
        with Checkpoint(self._settings.path, check_finite=self._settings.check_weights) as checkpoint:
            self._model = AttentionModel.load(
                self._spec,
                checkpoint,
                dtype=self._settings.torch_dtype,
                row_block=self._settings.row_block,
                progress=self._count,
                device=self._settings.torch_device,
            )
        n_blocks, block_size = self._blocks.n_blocks, self._blocks.block_size
        try:
            self._cache = KVCache(
                self._spec, n_blocks, block_size, self._settings.torch_dtype, self._settings.torch_device
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise NoMemory(f"attention.kv_memory: {self._kv_bytes} bytes cannot be allocated: {error}") from error
        return self._endpoint.address

    def loaded_bytes(self) -> int:
        """Bytes read so far, for a progress bar."""
        return self._loaded_bytes

    def connect(self, router: Address, medium: Medium | None, timeout_s: float) -> None:
        """Connect to the router of this shard and start to serve. Raises TransportError."""
        wire = self._endpoint.connect(router, time.monotonic() + timeout_s, medium)
        settings = self._settings
        self._moe = MoEClient(
            wire,
            settings.torch_dtype,
            settings.torch_device,
            self._spec.d_model,
            settings.step_timeout_s,
            self._spec.moe_layers,
        )
        self._loop.add(wire)
        self._loop.start()

    def submit(self, requests: tuple[GenerationRequest, ...]) -> Refusal | None:
        """Admit requests of one gateway, the choices of one client's request, all or none; or say why not. From then on
        their tokens and their ends go to it.

        A gateway that has just connected may be quicker here than its wire, which is waited for a moment.
        """
        if self._moe is None or self._loop.failure is not None:
            return Refusal(Refusal.UNAVAILABLE, "the attention shard has no router", retry_after_s=1.0)
        gateway = requests[0].gateway
        with self._lock:
            if not self._gateway_came.wait_for(lambda: gateway in self._gateways, _GATEWAY_WAIT_S):
                return Refusal(Refusal.UNAVAILABLE, f"no wire to gateway {gateway}", retry_after_s=1.0)
            now = Instant.now()
            try:
                self._scheduler.add_all(requests, now.clock_s)
            except NeverFits as error:
                return Refusal(Refusal.INVALID, str(error), field=error.field)
            except QueueFull as error:
                return Refusal(Refusal.FULL, str(error), retry_after_s=error.retry_after_s)
            for request in requests:
                self._owner[request.request_id] = gateway
                self._observer.admit(request, now)
        self._loop.wake()
        return None

    def abort(self, request_id: str) -> bool:
        """End a request; its blocks are free before the next step is formed. False if it was not running."""
        with self._lock:
            known = self._scheduler.abort(request_id)
        self._loop.wake()
        return known

    def stats(self) -> AttentionStats:
        """Queue, KV blocks, counters and traffic. Raises RuntimeError when the data plane has failed."""
        self._loop.check()
        with self._lock:
            running, waiting = self._scheduler.n_running, self._scheduler.n_waiting
            free = self._blocks.n_free
        return AttentionStats(
            pid=os.getpid(),
            weight_bytes=self._loaded_bytes,
            running=running,
            waiting=waiting,
            kv_blocks=self._blocks.n_blocks,
            kv_blocks_free=free,
            tokens=self._tokens,
            **self._work._asdict(),
            bytes_sent=self._loop.bytes_sent(),
            wires=traffic(self._loop.wires()),
        )

    def stop(self) -> None:
        """Close every wire and end the loop thread; gateways see their streams' shard as gone. Idempotent."""
        self._endpoint.close()
        self._loop.stop()

    # -- data plane (loop thread) -------------------------------------------------------------------------------

    def _step(self) -> None:
        """One step of continuous batching; without work it only publishes what ended meanwhile."""
        with self._lock:
            begun = Instant.now()
            plan = self._scheduler.schedule(begun.clock_s)
        events = self._observer.note(plan.events, begun)
        if plan.chunks:
            events += self._run(plan, begun)
        if events:
            self._publish(events)
        if self._moe is None:
            self._leave_gateways()

    def _run(self, plan: StepPlan, begun: Instant) -> list[TokenEvent]:
        """Compute a step, count it, and put its times and those of its requests where they belong."""
        done, moe = self._work, self._moe
        span = self._observer.begin_step(plan, begun, done.steps + 1)
        if moe is not None:
            moe.begin_step(span.traceparent if span else "")
        events = self._compute(plan)
        now = Instant.now()
        waited_s, batches = (moe.waited_s, moe.batches) if moe else (0.0, 0)
        self._work = _Work(
            done.steps + 1,
            done.busy_s + now.clock_s - begun.clock_s,
            done.experts_wait_s + waited_s,
            done.moe_batches + batches,
        )
        self._observer.end_step(span, now, events, waited_s)
        return self._observer.note(events, now)

    def _compute(self, plan: StepPlan) -> list[TokenEvent]:
        assert self._model is not None
        assert self._cache is not None
        if self._moe is None:
            return self._void(plan, FinishReason.UNAVAILABLE, "the attention shard lost its router")
        try:
            logits = self._model.forward(step_batch(plan, self._settings.torch_device), self._cache, self._moe)
            sampled = sample_plan(plan, logits)
        except MoEUnavailable as error:
            log.warning("a step is void: %s", error, extra=self._about(plan))
            return self._void(plan, FinishReason.UNAVAILABLE, str(error))
        except Exception:
            log.exception("a step is void by an error of the engine", extra=self._about(plan))
            return self._void(plan, FinishReason.ERROR, "the engine failed in this step")
        with self._lock:
            return self._scheduler.update(plan, sampled)

    def _about(self, plan: StepPlan) -> dict[str, Any]:
        """For the log: whose step it was."""
        traces = ",".join(self._observer.trace_ids(plan))
        return fields(requests=len(plan.chunks), trace_ids=traces or None)

    def _void(self, plan: StepPlan, reason: FinishReason, message: str) -> list[TokenEvent]:
        if self._moe is not None:
            self._moe.abandon()
        with self._lock:
            return self._scheduler.fail(plan, reason, message)

    def _publish(self, events: list[TokenEvent]) -> None:
        """One frame per gateway with everything that this step has for it."""
        shares: dict[str, list[TokenEvent]] = {}
        with self._lock:
            for event in events:
                shares.setdefault(self._owner[event.request_id], []).append(event)
                if event.finish is not None:
                    del self._owner[event.request_id]
        self._tokens += sum(event.token is not None for event in events)
        deadline = time.monotonic() + self._settings.step_timeout_s
        for gateway, share in shares.items():
            wire = self._gateways.get(gateway)
            if wire is None:
                continue  # it went away: its requests are being aborted
            try:
                wire.send(Kind.TOKENS, FrameTag(step=self._work.steps), encode_tokens(share), deadline)
            except (PeerGone, WireTimeout) as error:
                self._loop.drop(wire, PeerGone(str(error)))

    def _on_wire(self, wire: Wire) -> None:
        with self._lock:
            self._gateways[wire.peer] = wire
            self._gateway_came.notify_all()
        self._loop.add(wire)

    def _on_frame(self, wire: Wire, frame: Frame) -> None:
        raise ProtocolError(f"attention shard {self.name}: unexpected frame of kind {frame.kind} from {wire.peer}")

    def _on_gone(self, wire: Wire, error: PeerGone) -> None:
        if self._moe is not None and wire is self._moe.wire:
            log.error("the router of %s is gone: %s", self.name, error)
            self._moe = None
            with self._lock:
                for request_id in self._owner:
                    self._scheduler.abort(request_id, FinishReason.UNAVAILABLE, "the attention shard lost its router")
        elif self._gateways.get(wire.peer) is wire:
            self._abort_all(wire.peer)

    def _leave_gateways(self) -> None:
        """A shard that can serve nothing must not look idle: gateways go elsewhere once its wires are closed."""
        for wire in list(self._gateways.values()):
            self._loop.drop(wire, PeerGone("the attention shard lost its router"))

    def _abort_all(self, gateway: str) -> None:
        """Nobody is left to receive these tokens."""
        with self._lock:
            del self._gateways[gateway]
            for request_id in [r for r, owner in self._owner.items() if owner == gateway]:
                self._scheduler.abort(request_id)

    def _next_deadline(self) -> float:
        """Now, while there is work; else whenever the loop cares."""
        with self._lock:
            idle = self._scheduler.idle
        return time.monotonic() + (self._settings.step_timeout_s if idle else 0.0)

    def _count(self, read: int) -> None:
        self._loaded_bytes += read
