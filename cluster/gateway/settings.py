"""What a gateway is told when it is made. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GatewaySettings:
    """``port`` 0 takes any free one. ``max_message`` in bytes, both directions."""

    model_path: Path
    model_name: str
    dtype: str
    context_length: int
    host: str
    port: int
    reflection: bool
    max_message: int
