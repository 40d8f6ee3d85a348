"""Figures that actors tell about themselves: plain data for the controller's view, which needs no torch for them."""

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


@dataclass(frozen=True)
class ExpertStats:
    """Counters since the start; ``rows`` were received, ``pairs`` (row, expert) were computed.

    ``batches`` were computed in ``busy_s`` seconds; on a GPU these are the device's, and both lag by the batches that
    it has under way or has ended since the last one came. ``weight_bytes`` are held now, ``bytes_sent``
    are by medium."""

    pid: int
    epoch: int
    experts: int
    weight_bytes: int
    rows: int
    pairs: int
    busy_s: float
    batches: int
    bytes_sent: dict[str, int]
    wires: tuple[WireTraffic, ...]


@dataclass(frozen=True)
class RouterStats:
    """``rows_per_shard``: rows sent to each expert shard since the start, by name. ``reroutes``: batches of rows that
    were sent again. ``longest_wait_s``: longest time a batch waited for its experts. ``batches``, ``dispatch_s``,
    ``combine_s``: see :class:`actors.dispatcher.Completed`. ``bytes_sent``: since the start, by medium."""

    pid: int
    epoch: int
    weight_bytes: int
    rows_per_shard: dict[str, int]
    reroutes: int
    longest_wait_s: float
    batches: int
    dispatch_s: float
    combine_s: float
    bytes_sent: dict[str, int]
    wires: tuple[WireTraffic, ...]


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """Counters are since the start. ``busy_s`` seconds were spent in steps; for ``experts_wait_s`` of these only
    experts were waited for: they were sent ``moe_batches`` (see :class:`actors.moe_client.MoEClient`).
    ``kv_blocks_free`` includes ``kv_blocks_cached``, whose content can still be found by the prefix cache;
    ``kv_blocks_shared`` are used by more than one request. ``micro_batches``: of the last step."""

    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0
    kv_block_size: int = 0
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_shared: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    micro_batches: int = 0
    steps: int = 0
    busy_s: float = 0.0
    experts_wait_s: float = 0.0
    moe_batches: int = 0


@dataclass(frozen=True, kw_only=True)
class AttentionStats(EngineFigures):
    """``tokens`` were told since the start. ``bytes_sent``: since the start, by medium."""

    pid: int
    weight_bytes: int
    tokens: int
    bytes_sent: dict[str, int]
    wires: tuple[WireTraffic, ...]
