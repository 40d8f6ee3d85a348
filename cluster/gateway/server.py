"""Gateway: the way in. Its doors share an event loop, which the data-plane thread feeds with tokens."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from actors.engine.request import TokenEvent
from actors.frames import Kind
from actors.loop import LoopThread
from actors.losses import Known, Losses
from actors.span_log import Recorded, SpanLog
from actors.token_frames import decode_tokens
from actors.transport.base import Address, EndpointFactory, Frame, Medium, PeerGone, ProtocolError, Wire
from cluster.fleet import ActorHandle
from cluster.gateway.grpc_door import GrpcDoor, Health, HealthDoor
from cluster.gateway.http.api import api, metrics_api
from cluster.gateway.http.door import HttpDoor
from cluster.gateway.http.watched import Watched
from cluster.gateway.inference import Inference
from cluster.gateway.peers import AttentionPeer
from cluster.gateway.served_model import ServedModel, served_model
from cluster.gateway.settings import Doors, GatewaySettings, PortInUse
from cluster.gateway.streams import Streams
from cluster.telemetry.http_meter import HttpMeter
from cluster.telemetry.metrics import GatewayMetrics
from cluster.telemetry.request import RequestObserver

log = logging.getLogger(__name__)

_DRAIN_S = 5.0


@dataclass(frozen=True)
class GatewayStats:
    """``streams`` are open now. Since the start ``requests`` came, and ``replays`` times an
    attention shard took over a stream that another, or it itself before a fault, had begun.
    """

    pid: int
    doors: Doors
    streams: int
    requests: int
    replays: int


class Gateway(Recorded):
    """One gateway. ``load``, ``connect`` to the attention shards, ``serve``; ``stop`` drains first.

    While it serves, attention shards come by ``attach`` and go by ``retire``, or when their wire ends.
    """

    def __init__(self, name: str, settings: GatewaySettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._settings = settings
        self._streams = Streams(name, settings.recovery_timeout_s)
        self._wires: dict[str, Wire] = {}
        self._retired: set[str] = set()
        self._spans = SpanLog()
        self._losses = Losses(f"gateway {name}")
        self._model: ServedModel | None = None
        self._inference: Inference | None = None
        self._controller: ActorHandle | None = None
        self._metrics: GatewayMetrics | None = None
        self._health = Health()
        self._open_doors = AsyncExitStack()
        self._doors = Doors("")
        self._stopping = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name}-grpc", daemon=True)
        self._thread.start()
        self._data = LoopThread(name, self._on_frame, self._on_gone)
        self._endpoint = make_endpoint(name, self._data.add)

    def load(self) -> Address:
        """Read the tokenizer and the chat template."""
        self._model = served_model(self._settings)
        self._data.start()
        return self._endpoint.address

    def connect(
        self, peers: Sequence[AttentionPeer], controller: ActorHandle, medium: Medium | None, timeout_s: float
    ) -> None:
        """Connect to the attention shards there are at the start. Raises TransportError."""
        deadline = time.monotonic() + timeout_s
        self._controller = controller
        for peer in peers:
            self.attach(peer, medium, deadline - time.monotonic())

    def attach(self, peer: AttentionPeer, medium: Medium | None, timeout_s: float) -> None:
        """Connect to one more attention shard; streams may go there at once. From any thread, at any time.

        Raises TransportError, and ValueError for a name that was used before: names are not used twice.
        """
        # before connecting: at the shard a second wire of this gateway would take the place of the first
        self._streams.check_new_peer(peer.name)
        wire = self._endpoint.connect(peer.address, time.monotonic() + timeout_s, medium)
        try:
            # told first: should the wire die at once, its loss must find the peer
            self._await(self._streams.add_peer(peer))
        except BaseException:
            wire.close()
            raise
        self._wires[peer.name] = wire
        self._data.add(wire)

    def retire(self, name: str, timeout_s: float) -> int:
        """Give an attention shard up: no new streams there; those it has may end within ``timeout_s``, the others are
        moved to other shards. Then its wire is closed. Returns how many were moved; 0 for a shard that is gone already.

        Raises ValueError for a shard that was never attached, and OnlyShard when streams are left after ``timeout_s``
        and no other shard could take them: then the shard stays.
        """
        moved: int = self._await(self._streams.retire_peer(name, timeout_s))
        self._retired.add(name)
        if (wire := self._wires.pop(name, None)) is not None:
            wire.close()
        return moved

    def wait_for_loss(self, epoch: int, known: frozenset[str], timeout_s: float) -> Known:
        """Names of all attention shards whose wires were lost, as soon as there are others than ``known``, or after
        ``timeout_s``; as a router tells it of expert shards, but of one epoch. RuntimeError once it is stopped."""
        return self._losses.wait((epoch, known), timeout_s)

    def serve(self) -> Doors:
        """Open the doors. Raises PortInUse, and ConfigError for TLS files it cannot use."""
        self._doors = self._await(self._serve())
        return self._doors

    def stats(self) -> GatewayStats:
        """Open streams and totals. Raises RuntimeError when the data plane has failed."""
        self._data.check()
        requests = self._inference.requests if self._inference else 0
        return GatewayStats(os.getpid(), self._doors, len(self._streams), requests, self._streams.replays)

    def stop(self) -> None:
        """Refuse new calls, give running ones a few seconds, close everything. Idempotent."""
        if self._loop.is_closed():
            return
        self._losses.close()
        self._await(self._close())
        if self._metrics is not None:
            self._metrics.close()
        self._endpoint.close()
        self._data.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- the event loop -------------------------------------------------------------------------------------------

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        began_ns = self._spans.begin()
        self._streams.deliver(events)
        if began_ns:
            self._spans.end("deliver", began_ns, events=len(events))

    async def _serve(self) -> Doors:
        assert self._model is not None
        assert self._controller is not None
        settings, health = self._settings, self._health
        metrics = self._metrics = self._make_metrics(self._controller)
        observer = RequestObserver(self._model.name, metrics.requests)
        inference = self._inference = Inference(self._model, self._streams, observer)
        await health.start(lambda: self._streams.ready, self._streams.readiness_changed)
        doors = Doors(await self._open(GrpcDoor(inference, self._controller, health, settings)))
        if settings.health_port is not None:
            doors = replace(
                doors, health=await self._open_beside(HealthDoor(health, settings.host, settings.health_port))
            )
        watched = Watched(lambda: self._streams.ready and not self._stopping, metrics.exposition)
        if settings.http_port is not None:
            doors = replace(
                doors, http=await self._open_beside(self._http_door(inference, watched, metrics, settings.http_port))
            )
        if settings.metrics_port is not None:
            app = HttpMeter(metrics_api(watched), metrics.requests.http)
            door = HttpDoor(app, settings.host, settings.metrics_port, None, asyncio.Event())
            doors = replace(doors, metrics=await self._open_beside(door))
        return doors

    def _http_door(self, inference: Inference, watched: Watched, metrics: GatewayMetrics, port: int) -> HttpDoor:
        settings, closing = self._settings, asyncio.Event()
        app = api(inference, settings.access, watched, settings.max_message, closing)
        return HttpDoor(HttpMeter(app, metrics.requests.http), settings.host, port, settings.tls, closing)

    def _make_metrics(self, controller: ActorHandle) -> GatewayMetrics:
        streams = self._streams
        return GatewayMetrics(
            self._settings.telemetry, self.name, controller, lambda: len(streams), lambda: streams.replays
        )

    async def _open(self, door: GrpcDoor | HealthDoor | HttpDoor) -> str:
        self._open_doors.push_async_callback(door.close)
        return await door.open()

    async def _open_beside(self, door: HealthDoor | HttpDoor) -> str:
        """As ``_open``, but a successor does without a door that somebody has taken meanwhile: gRPC needs it."""
        try:
            return await self._open(door)
        except PortInUse as error:
            if not self._settings.succeeds:
                raise
            log.error("%s; this gateway goes on without that door", error)
            return ""

    async def _close(self) -> None:
        self._stopping = True
        await self._health.stop()
        await self._streams.drain(_DRAIN_S)
        await self._open_doors.aclose()

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- data plane (loop thread) -----------------------------------------------------------------------------------

    def _on_frame(self, wire: Wire, frame: Frame) -> None:
        if frame.kind != Kind.TOKENS:
            raise ProtocolError(f"gateway {self.name}: unexpected frame of kind {frame.kind} from {wire.peer}")
        self._loop.call_soon_threadsafe(self._deliver, decode_tokens(frame))

    def _on_gone(self, wire: Wire, error: PeerGone) -> None:
        if wire.peer in self._retired:
            log.info("attention shard %s is retired", wire.peer)
        else:
            log.error("attention shard %s is gone: %s", wire.peer, error)
        if wire.peer not in self._retired and self._data.failure is None:  # else it is this end that failed
            epoch, lost = self._losses.now
            self._losses.tell(epoch, lost | {wire.peer})
        self._wires.pop(wire.peer, None)
        self._loop.call_soon_threadsafe(self._streams.lose_peer, wire.peer)
