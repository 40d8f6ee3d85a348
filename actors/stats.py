"""Figures that actors tell about themselves: plain data for the controller's view."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from actors.transport.base import Wire


@dataclass(frozen=True)
class WireTraffic:
    """One wire as its owner sees it."""

    peer: str
    medium: str
    bytes_sent: int
    bytes_received: int


def traffic(wires: Iterable[Wire]) -> tuple[WireTraffic, ...]:
    """Counters of ``wires``, by the peer's name."""
    found = (WireTraffic(w.peer, w.medium.value, w.stats.bytes_sent, w.stats.bytes_received) for w in wires)
    return tuple(sorted(found, key=lambda w: w.peer))
