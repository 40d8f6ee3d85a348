"""What a gateway is told when it is made. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.access import AccessList
from cluster.config import TlsConfig


def host_port(host: str, port: int) -> str:
    """ "HOST:PORT", with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class GatewaySettings:
    """``port`` 0 takes any free one. ``max_message`` in bytes, both directions. ``tls`` None: plaintext.
    ``recovery_timeout_s``: how long a stream that lost its attention shard goes on without a new token."""

    model_path: Path
    model_name: str
    dtype: str
    context_length: int
    host: str
    port: int
    reflection: bool
    max_message: int
    recovery_timeout_s: float
    tls: TlsConfig | None
    access: AccessList
