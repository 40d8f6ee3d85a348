"""What every actor's process runs: a plain object, hosted. Imports little, so that each process loads only its own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from actors.transport.base import EndpointLike, Wire
from actors.transport.endpoint import Endpoint
from cluster.actor_class import ActorClass
from cluster.config import TelemetryConfig, WireTlsConfig
from cluster.telemetry.process import ProcessTelemetry
from cluster.tls import wire_tls

_LAST_CALL = "stop"


@dataclass(frozen=True)
class RayEndpoints:
    """Makes an actor's endpoint inside its process: it listens on the node's own address, and reads the node's own
    files for ``tls``."""

    secret: bytes
    tls: WireTlsConfig | None

    def __call__(self, name: str, on_wire: Callable[[Wire], None]) -> EndpointLike:
        node_id = ray.get_runtime_context().get_node_id()
        tls = wire_tls(self.tls) if self.tls is not None else None
        return Endpoint(name, node_id, self.secret, host=ray.util.get_node_ip_address(), on_wire=on_wire, tls=tls)


class Hosted:
    """The Ray actor around a plain object. Ray wraps every method of an actor's class for tracing, inherited and
    private ones too: held like this, the object's own calls, several at each layer, stay plain.
    """

    def __init__(self, telemetry: TelemetryConfig, name: str, role: ActorClass, *args: Any) -> None:
        self._telemetry = ProcessTelemetry(telemetry, name)
        self._role = role.load()(*args)
        # Ray's and torch's modules are 200,000 objects, which stay: a full collection that looks at them holds every
        # step and stream of the process for 90 ms.
        gc.freeze()

    def call(self, method: str, *args: Any) -> Any:
        """Call a public method of the object. After ``stop`` the process is only waiting for its end."""
        try:
            return getattr(self._role, method)(*args)
        finally:
            if method == _LAST_CALL:
                self._telemetry.flush()

    def live(self) -> None:
        """Returns never: the call fails when the process ends, which tells its caller so within milliseconds."""
        threading.Event().wait()
