"""Gateway: the way in. A gRPC server in an event loop of its own, fed with tokens by the data-plane thread."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from expertmesh.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.loop import LoopThread
from actors.losses import Known, Losses
from actors.messages import Kind, decode_tokens
from actors.model.families import load_spec
from actors.transport.base import Address, EndpointFactory, Frame, Medium, PeerGone, ProtocolError, Wire
from cluster.config import ConfigError, TlsConfig
from cluster.fleet import ActorHandle
from cluster.gateway.auth import Doorkeeper
from cluster.gateway.chat import ChatTemplate
from cluster.gateway.control import ControlService
from cluster.gateway.peers import AttentionPeer
from cluster.gateway.served_model import ServedModel, default_sampling, stop_ids
from cluster.gateway.service import InferenceService
from cluster.gateway.settings import GatewaySettings, host_port
from cluster.gateway.streams import Streams
from cluster.gateway.tokenizer import Tokenizer
from cluster.tls import server_pem

log = logging.getLogger(__name__)

_DRAIN_S = 5.0
_CLOSE_S = 0.5
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name


class PortInUse(RuntimeError):
    """The gateway's address is taken by somebody else."""


@dataclass(frozen=True)
class GatewayStats:
    """``address`` is "HOST:PORT"; ``streams`` are open now. Since the start ``requests`` came, and ``replays`` times an
    attention shard took over a stream that another, or it itself before a fault, had begun.
    """

    pid: int
    address: str
    streams: int
    requests: int
    replays: int


class Gateway:
    """One gateway. ``load``, ``connect`` to the attention shards, ``serve``; ``stop`` drains first.

    While it serves, attention shards come by ``attach`` and go by ``retire``, or when their wire ends.
    """

    def __init__(self, name: str, settings: GatewaySettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._settings = settings
        self._streams = Streams(name, settings.recovery_timeout_s)
        self._wires: dict[str, Wire] = {}
        self._retired: set[str] = set()
        self._losses = Losses(f"gateway {name}")
        self._model: ServedModel | None = None
        self._inference: InferenceService | None = None
        self._control: ControlService | None = None
        self._controller: ActorHandle | None = None
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None
        self._address = ""
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

    def serve(self) -> str:
        """Open the door. Returns "HOST:PORT"; raises PortInUse, and ConfigError for TLS files it cannot use."""
        self._address = self._await(self._serve())
        return self._address

    def stats(self) -> GatewayStats:
        """Open streams and totals. Raises RuntimeError when the data plane has failed."""
        self._data.check()
        requests = self._inference.requests if self._inference else 0
        return GatewayStats(os.getpid(), self._address, len(self._streams), requests, self._streams.replays)

    def stop(self) -> None:
        """Refuse new calls, give running ones a few seconds, close everything. Idempotent."""
        if self._loop.is_closed():
            return
        self._losses.close()
        self._await(self._close())
        self._endpoint.close()
        self._data.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- the event loop -------------------------------------------------------------------------------------------

    async def _serve(self) -> str:
        assert self._model is not None
        assert self._controller is not None
        settings = self._settings
        keeper = Doorkeeper(settings.access)
        self._server = grpc.aio.server(interceptors=[keeper], options=_server_options(settings.max_message))
        self._inference = InferenceService(self._model, self._streams)
        inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, self._server)
        self._control = ControlService(self._controller)
        control_pb2_grpc.add_ControlServicer_to_server(self._control, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (INFERENCE, CONTROL, health.SERVICE_NAME, reflection.SERVICE_NAME)
        if settings.reflection:
            reflection.enable_server_reflection(names, self._server)
        port = _open_port(self._server, settings)
        await self._server.start()
        self._health_task = self._loop.create_task(self._watch_health())
        return host_port(settings.host, port)

    async def _watch_health(self) -> None:
        """ "" and Control are live; Inference is ready while steps can be computed."""
        serving = health_pb2.HealthCheckResponse.SERVING
        await self._health.set("", serving)
        await self._health.set(CONTROL, serving)
        while True:
            ready = self._streams.ready
            await self._health.set(INFERENCE, serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING)
            await self._streams.readiness_changed(ready)

    async def _close(self) -> None:
        if self._health_task is not None:
            self._health_task.cancel()
        await self._health.enter_graceful_shutdown()
        await self._streams.drain(_DRAIN_S)
        if self._server is not None:
            await self._server.stop(_CLOSE_S)
        if self._control is not None:
            self._control.close()

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- data plane (loop thread) -----------------------------------------------------------------------------------

    def _on_frame(self, wire: Wire, frame: Frame) -> None:
        if frame.kind != Kind.TOKENS:
            raise ProtocolError(f"gateway {self.name}: unexpected frame of kind {frame.kind} from {wire.peer}")
        self._loop.call_soon_threadsafe(self._streams.deliver, decode_tokens(frame))

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


def served_model(settings: GatewaySettings) -> ServedModel:
    """What the checkpoint says of itself. Raises CheckpointError, TokenizerError, ConfigError."""
    spec = load_spec(settings.model_path)
    tokenizer = Tokenizer.load(settings.model_path)
    generation = settings.model_path / "generation_config.json"
    try:
        config = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
        sampling, stops = default_sampling(config), stop_ids(config, tokenizer)
    except ValueError as error:
        raise ConfigError(f"{generation}: {error}") from error
    return ServedModel(
        name=settings.model_name,
        model_type=spec.model_type,
        dtype=settings.dtype,
        context_length=settings.context_length,
        vocab_size=spec.vocab_size,
        layers=spec.n_layers,
        moe_layers=len(spec.moe_layers),
        experts_per_layer=spec.moe.n_experts,
        experts_per_token=spec.moe.top_k,
        stop_ids=stops | frozenset(spec.eos_token_ids),
        default_sampling=sampling,
        tokenizer=tokenizer,
        chat=ChatTemplate.of(tokenizer),
    )


def _open_port(server: grpc.aio.Server, settings: GatewaySettings) -> int:
    """With TLS if that is configured. Returns the port; raises PortInUse, ConfigError."""
    address = host_port(settings.host, settings.port)
    credentials = _server_credentials(settings.tls) if settings.tls is not None else None
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise PortInUse(f"gateway: {settings.host}:{settings.port} cannot be opened; is it in use?") from error


def _server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """With ``client_ca`` every client must show a certificate."""
    pem = server_pem(tls)
    mutual = pem.client_ca is not None
    return grpc.ssl_server_credentials([(pem.key, pem.certificate)], pem.client_ca, require_client_auth=mutual)


def _server_options(max_message: int) -> list[tuple[str, int]]:
    """Finite messages, a port of our own, and patience with clients that ping every ten seconds."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message),
        ("grpc.max_send_message_length", max_message),
        ("grpc.http2.min_ping_interval_without_data_ms", 9_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_age_ms", 2 * 3600 * 1000),
        ("grpc.max_connection_age_grace_ms", 600 * 1000),
    ]
