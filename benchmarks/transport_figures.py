"""What the wires' benchmark makes of its times: medians, ratios, bandwidths, and a model of cost. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.arrivals import percentile


@dataclass(frozen=True)
class Trips:
    """Round trips of one size, in seconds. ``p50`` and ``p99`` are medians over the rounds of each round's own;
    ``rounds`` are the medians of each, in order."""

    p50: float
    p99: float
    rounds: tuple[float, ...]


def trips(rounds: Sequence[Sequence[float]]) -> Trips:
    """Of each round's times in seconds."""
    medians = tuple(percentile(times, 0.5) for times in rounds)
    return Trips(median(medians), median(percentile(times, 0.99) for times in rounds), medians)


def gb_per_s(size: int, trip_s: float) -> float:
    """What a round trip of ``size`` bytes each way moves, in 10^9 bytes a second."""
    return 2 * size / trip_s / 1e9


@dataclass(frozen=True)
class Wanted:
    """``ratio`` of what was measured to the limit that it is compared with, and what it shall not exceed."""

    what: str
    ratio: float
    most: float

    @property
    def met(self) -> bool:
        """NaN, for what was not measured, is not met."""
        return self.ratio <= self.most


def ratio(ours: Trips, limit: Trips) -> float:
    """Median of the rounds' ratios: both were measured within the same second of each round, so that a machine that is
    slower in some of them does not count."""
    return median(mine / theirs for mine, theirs in zip(ours.rounds, limit.rounds, strict=True))


@dataclass(frozen=True)
class Cost:
    """A frame of n bytes takes ``fixed_s`` + n * ``byte_s`` seconds one way."""

    fixed_s: float
    byte_s: float

    def of(self, size: float) -> float:
        """Seconds."""
        return self.fixed_s + size * self.byte_s


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> Cost:
    """The line with the least sum of squared relative errors, so that small frames count as much as large ones.

    Neither part is negative: what would be is 0, and the other is fitted alone. ValueError for fewer than two sizes.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(seconds):
        raise ValueError(f"{len(set(sizes))} sizes and {len(seconds)} times: at least two sizes, with one time each")
    one = [1 / t for t in seconds]
    per = [n / t for n, t in zip(sizes, seconds, strict=True)]
    s11, s12, s22 = _dot(one, one), _dot(one, per), _dot(per, per)
    r1, r2 = sum(one), sum(per)
    scale = s11 * s22 - s12 * s12
    fixed, byte = (r1 * s22 - r2 * s12) / scale, (r2 * s11 - r1 * s12) / scale
    if fixed < 0:
        return Cost(0.0, r2 / s22)
    return Cost(r1 / s11, 0.0) if byte < 0 else Cost(fixed, byte)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class LayerBytes:
    """What one MoE layer moves: ``rows`` bytes from the attention shard to its router, and as many back; ``dispatch``
    and ``results``: bytes to and from each expert shard."""

    rows: int
    dispatch: tuple[int, ...]
    results: tuple[int, ...]


def layer_bounds(moved: LayerBytes, near: Cost, far: Cost) -> tuple[float, float]:
    """Seconds of one layer without compute, where every expert shard has a node of its own: least and most.

    ``near``: the wire between attention shard and router, ``far``: that to the shards. The least if frames to different
    shards overlap in all but their bytes, which share the router's memory and link; the most if the router handles one
    frame after the other.
    """
    rows = 2 * near.of(moved.rows)
    least = far.of(sum(moved.dispatch)) + far.of(sum(moved.results))
    most = sum(far.of(n) for n in (*moved.dispatch, *moved.results))
    return rows + least, rows + most
