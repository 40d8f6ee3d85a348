"""What actors refuse, and why: known to the controller and to gateways, which do without torch."""

from __future__ import annotations

from dataclasses import dataclass


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


class StaleEpoch(RuntimeError):
    """A map is to be prepared or committed that was given up, or never prepared."""


class NoMemory(RuntimeError):
    """The node, or its GPU, does not have the memory that the configuration gives to the KV cache."""
