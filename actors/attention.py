"""AttentionShard: keeps the KV cache, runs the layer loop, and sends tokens to gateways.

This file is its control side and its wires; ``attention_engine.py`` is what happens in a step, in the data-plane
thread. Requests and aborts come from other threads and take effect when the next step is formed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from actors.attention_engine import AttentionEngine
from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.engine.scheduler import NeverFits, QueueFull
from actors.frames import Kind
from actors.kv_memory import allocate_cache
from actors.loop import LoopThread
from actors.micro_batches import MicroBatchTuner
from actors.model.decoder import AttentionModel
from actors.model.families import load_spec
from actors.model.weights import Checkpoint
from actors.moe_client import MoEClient
from actors.refusals import Refusal
from actors.settings import EngineSettings, ModelSettings
from actors.span_log import Recorded, SpanLog
from actors.stats import AttentionStats, EngineFigures, traffic
from actors.step_runner import StepRunner
from actors.token_frames import encode_tokens
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


class AttentionShard(Recorded):
    """One data-parallel attention replica. ``load``, ``connect`` to its router; gateways connect to it."""

    def __init__(self, name: str, model: ModelSettings, engine: EngineSettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._settings = model
        self._engine_settings = engine
        self._spec = load_spec(model.path)
        self._model: AttentionModel | None = None
        self._engine: AttentionEngine | None = None
        self._moe: MoEClient | None = None
        self._loaded_bytes = 0
        self._tokens = 0
        self._lock = threading.Lock()  # guards the two below; taken before the engine's own
        self._owner: dict[str, str] = {}
        self._gateways: dict[str, Wire] = {}
        self._gateway_came = threading.Condition(self._lock)
        self._spans = SpanLog()
        self._loop = LoopThread(
            name, self._on_frame, self._on_gone, model.thread_count, self._next_deadline, self._step
        )
        self._endpoint = make_endpoint(name, self._on_wire)

    # -- control (from other threads) ---------------------------------------------------------------------------

    def load(self) -> Address:
        """Read this shard's weights. Returns where gateways connect."""
        with Checkpoint(self._settings.path, self._settings.check_weights, self._settings.map_weights) as checkpoint:
            self._model = AttentionModel.load(
                self._spec,
                checkpoint,
                dtype=self._settings.torch_dtype,
                row_block=self._settings.row_block,
                progress=self._count,
                device=self._settings.torch_device,
                quantization=self._settings.quant_kind,
            )
        return self._endpoint.address

    def loaded_bytes(self) -> int:
        """Bytes read so far, for a progress bar."""
        return self._loaded_bytes

    def connect(self, router: Address, medium: Medium | None, timeout_s: float) -> None:
        """Allocate the KV cache, connect to the router of this shard and start to serve. By then the experts of this
        node are loaded, so what is measured to be free is free. Raises TransportError, NoMemory."""
        assert self._model is not None  # load comes first
        settings, engine = self._settings, self._engine_settings
        cache, blocks = allocate_cache(self._spec, settings, engine)
        runner = StepRunner(self._model, cache, MicroBatchTuner(engine.micro_batches), settings.torch_device)
        limits = replace(engine.limits, layers=len(self._spec.moe_layers))
        self._engine = AttentionEngine(self.name, limits, blocks, runner, self._spans, self._tell)
        wire = self._endpoint.connect(router, time.monotonic() + timeout_s, medium)
        self._moe = MoEClient(
            wire,
            settings.torch_dtype,
            settings.torch_device,
            self._spec.d_model,
            settings.step_timeout_s,
            self._spec.moe_layers,
            self._spans,
        )
        self._loop.add(wire)
        self._loop.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> Refusal | None:
        """Admit the choices of one request, all or none, or say why not. From then on their tokens and their ends go to
        their gateway.

        A gateway that has just connected may be quicker here than its wire, which is waited for a moment.
        """
        if self._engine is None or self._moe is None or self._loop.failure is not None:
            return Refusal(Refusal.UNAVAILABLE, "the attention shard has no router", retry_after_s=1.0)
        gateway = requests[0].gateway
        with self._lock:
            if not self._gateway_came.wait_for(lambda: gateway in self._gateways, _GATEWAY_WAIT_S):
                return Refusal(Refusal.UNAVAILABLE, f"no wire to gateway {gateway}", retry_after_s=1.0)
            try:
                self._engine.admit(requests)
            except NeverFits as error:
                return Refusal(Refusal.INVALID, str(error), field=error.field)
            except QueueFull as error:
                return Refusal(Refusal.FULL, str(error), retry_after_s=error.retry_after_s)
            self._owner.update((request.request_id, gateway) for request in requests)
        self._loop.wake()
        return None

    def abort(self, request_id: str) -> bool:
        """End a request; its blocks are free before the next step is formed. False if it was not running."""
        known = self._engine is not None and self._engine.abort(request_id)
        self._loop.wake()
        return known

    def stats(self) -> AttentionStats:
        """Queue, KV blocks, counters and traffic; zeros before ``connect``. Raises RuntimeError when the data plane has
        failed."""
        self._loop.check()
        return AttentionStats(
            **vars(self._engine.figures() if self._engine else EngineFigures()),
            pid=os.getpid(),
            weight_bytes=self._loaded_bytes,
            tokens=self._tokens,
            bytes_sent=self._loop.bytes_sent(),
            wires=traffic(self._loop.wires()),
        )

    def stop(self) -> None:
        """Close every wire and end the loop thread; gateways see their streams' shard as gone. Idempotent."""
        self._spans.take()  # whoever waits for steps waits in vain
        self._endpoint.close()
        self._loop.stop()

    # -- data plane (loop thread) -------------------------------------------------------------------------------

    def _step(self) -> None:
        assert self._engine is not None  # the loop starts after it is made
        self._engine.step(self._moe)
        if self._moe is None:
            self._leave_gateways()

    def _tell(self, events: list[TokenEvent]) -> None:
        """One frame per gateway with everything that a step has for it."""
        assert self._engine is not None
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
                wire.send(Kind.TOKENS, FrameTag(step=self._engine.steps), encode_tokens(share), deadline)
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
                self._abort(list(self._owner), FinishReason.UNAVAILABLE, "the attention shard lost its router")
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
            self._abort([r for r, owner in self._owner.items() if owner == gateway], FinishReason.CANCELLED)

    def _abort(self, request_ids: list[str], reason: FinishReason, message: str = "") -> None:
        for request_id in request_ids:
            if self._engine is not None:
                self._engine.abort(request_id, reason, message)

    def _next_deadline(self) -> float:
        """Now, while there is work; else whenever the loop cares."""
        idle = self._engine is None or self._engine.idle
        return time.monotonic() + (self._settings.step_timeout_s if idle else 0.0)

    def _count(self, read: int) -> None:
        self._loaded_bytes += read
