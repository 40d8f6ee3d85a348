"""What a gateway is told when it is made. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.access import AccessList
from cluster.config import TelemetryConfig, TlsConfig


class PortInUse(RuntimeError):
    """A door's address is taken by somebody else."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)  # both, so that it can travel between processes

    def __str__(self) -> str:
        return f"gateway: {self.args[0]}:{self.args[1]} cannot be opened; is it in use?"


def host_port(host: str, port: int) -> str:
    """ "HOST:PORT", with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class Doors:
    """Where a gateway listens, each "HOST:PORT", or "" for a door that it does not have."""

    grpc: str
    http: str = ""
    health: str = ""
    metrics: str = ""


@dataclass(frozen=True)
class GatewaySettings:
    """Of the ports 0 takes any free one, None leaves the door out. ``max_message`` in bytes, both directions. ``tls``
    None: plaintext. ``recovery_timeout_s``: how long a stream that lost its attention shard goes on without a new
    token. ``succeeds``: it takes the place of a gateway that died, at the same ports."""

    model_path: Path
    model_name: str
    dtype: str
    context_length: int
    host: str
    port: int
    http_port: int | None
    health_port: int | None
    metrics_port: int | None
    reflection: bool
    max_message: int
    recovery_timeout_s: float
    tls: TlsConfig | None
    access: AccessList
    telemetry: TelemetryConfig
    succeeds: bool = False
