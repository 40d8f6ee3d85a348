"""What is made of all runs: medians of those that nothing disturbed, ratios, and what is wanted of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from benchmarks.speed_cases import Figure

Precision = Literal["bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "int4")
OURS, ONE_PROCESS = "expertmesh", "expertmesh, one process"
TRANSFORMERS, VLLM, LLAMACPP = "transformers", "vLLM", "llama.cpp"
PEERS: Mapping[str, tuple[Precision, ...]] = {
    TRANSFORMERS: ("bf16",),
    VLLM: ("bf16",),
    LLAMACPP: ("bf16", "int8", "int4"),
}
"""Each with the precisions in which it is measured; llama.cpp's are BF16, Q8_0 and Q4_K_M."""
DISTURBED = 0.1
"""Cores that others may use in the mean during a run that counts, unless something else is asked for."""


@dataclass(frozen=True, order=True)
class Contender:
    """One engine in one precision; ``shards``: of ours, how many expert shards there are, 0: as many as usual."""

    engine: str
    precision: Precision
    shards: int = 0

    @property
    def label(self) -> str:
        """The engine's name, and what is unusual about it."""
        return self.engine + (f", {self.shards} expert shard{'s' if self.shards > 1 else ''}" if self.shards else "")


@dataclass(frozen=True)
class Sample:
    """One case, once. ``other_cpu``: cores that others used meanwhile."""

    contender: Contender
    case: str
    round_number: int
    figure: Figure
    other_cpu: float


@dataclass(frozen=True)
class Start:
    """One start of an engine: ``ready_s`` from its first process to its first answer being possible, None where each
    case is a start of its own; ``pss`` bytes of all its processes together, the most that was seen."""

    contender: Contender
    round_number: int
    ready_s: float | None
    pss: int
    other_cpu: float


Key = tuple[Contender, str]
"""Contender and case."""
Results = Mapping[Key, Figure]


def settle(samples: Iterable[Sample], limit: float) -> tuple[dict[Key, Figure], dict[Key, str]]:
    """The medians over the rounds of what was not disturbed, others using ``limit`` cores at most; and a note on what
    was, always or in some rounds."""
    groups: dict[Key, list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.contender, sample.case), []).append(sample)
    figures, notes = {}, {}
    for key, group in groups.items():
        quiet = [sample.figure for sample in group if sample.other_cpu <= limit]
        loud = [sample.other_cpu for sample in group if sample.other_cpu > limit]
        if quiet:
            figures[key] = _median(quiet)
        if loud:
            notes[key] = (
                f"disturbed: {len(loud)} of {len(group)} rounds left out, others used {min(loud):.2f} cores or more"
            )
    return figures, notes


def _median(figures: Sequence[Figure]) -> Figure:
    gaps = [one.tpot_s for one in figures if one.tpot_s is not None]
    return Figure(
        median(one.rate for one in figures), median(one.ttft_s for one in figures), median(gaps) if gaps else None
    )


def start_seconds(starts: Iterable[Start], limit: float) -> dict[Contender, float]:
    """The median over the rounds of those starts during which others used ``limit`` cores at most."""
    seconds: dict[Contender, list[float]] = {}
    for start in starts:
        if start.ready_s is not None and start.other_cpu <= limit:
            seconds.setdefault(start.contender, []).append(start.ready_s)
    return {contender: median(group) for contender, group in seconds.items()}


def most_memory(starts: Iterable[Start]) -> dict[Contender, int]:
    """Bytes, the most of all rounds."""
    most: dict[Contender, int] = {}
    for start in starts:
        most[start.contender] = max(most.get(start.contender, 0), start.pss)
    return most


@dataclass(frozen=True)
class Wish:
    """What is wanted: ``value`` of ``what`` is ``bound`` at least, or at most. ``against`` says with what it was
    compared; ``value`` is None if nothing was there to compare with."""

    what: str
    against: str
    value: float | None
    bound: float
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """met, not met, or not measured."""
        if self.value is None:
            return "not measured"
        return "met" if (self.value <= self.bound if self.at_most else self.value >= self.bound) else "not met"


RATIOS: Sequence[tuple[Precision, str, tuple[str, ...], float]] = (
    *(
        ("bf16", case, tuple(PEERS), least)
        for case, least in (("decode-1", 1.5), ("decode-8", 1.5), ("decode-32", 1.8))
    ),
    *(("bf16", case, tuple(PEERS), 2.0) for case in ("prefill-32x128", "prefill-1x2048")),
    *(("int8", case, (LLAMACPP,), least) for case, least in (("decode-1", 1.3), ("decode-8", 2.0), ("decode-32", 3.0))),
    *(("int4", case, (LLAMACPP,), least) for case, least in (("decode-1", 1.3), ("decode-8", 2.0))),
    *((precision, "batch-96", tuple(PEERS), 2.0) for precision in PRECISIONS),
)
"""(precision, case, peers of which the best counts, least ratio of our rate to it)."""
ROOF_SHARE = {"decode-1": 0.85, "decode-8": 0.85}
APART = 0.97
"""All actors apart have so much of the speed of the same engine in one process, at least."""
MEMORY = 1.25
"""PSS over the bytes of the weights, at most."""


def best_peer(results: Results, peers: Iterable[str], precision: Precision, case: str) -> tuple[str, float] | None:
    """The fastest of those that were measured, and its tokens a second."""
    keys = [(peer, (Contender(peer, precision), case)) for peer in peers]
    rates = [(results[key].rate, peer) for peer, key in keys if key in results]
    return (max(rates)[1], max(rates)[0]) if rates else None


def speed_wishes(results: Results, cases: Sequence[str], precisions: Sequence[Precision]) -> list[Wish]:
    """Ratios to the best peer of those cases and precisions that were asked for."""
    wishes = []
    for precision, case, peers, least in RATIOS:
        if case not in cases or precision not in precisions:
            continue
        ours, best = results.get((Contender(OURS, precision), case)), best_peer(results, peers, precision, case)
        possible = [peer for peer in peers if precision in PEERS[peer]]
        missing = [peer for peer in possible if (Contender(peer, precision), case) not in results]
        against = (best[0] if best else "no peer") + (f" (without {', '.join(missing)})" if best and missing else "")
        value = ours.rate / best[1] if ours and best else None
        wishes.append(Wish(f"{case}, {precision}", against, value, least))
    return wishes


def apart_wishes(results: Results, cases: Sequence[str]) -> list[Wish]:
    """Actors in processes of their own against the same engine in one; only where both were measured."""
    wishes = []
    for case in cases:
        apart, one = (results.get((Contender(engine, "bf16"), case)) for engine in (OURS, ONE_PROCESS))
        if apart and one:
            wishes.append(Wish(f"{case}, bf16, all actors apart", ONE_PROCESS, apart.rate / one.rate, APART))
    return wishes


def roof_wishes(shares: Mapping[Key, float]) -> list[Wish]:
    """``shares``: the part of its roof that each figure reaches."""
    keys = {case: (Contender(OURS, "bf16"), case) for case in ROOF_SHARE}
    return [
        Wish(f"{case}, bf16, share of the roof", "the machine", shares[key], ROOF_SHARE[case])
        for case, key in keys.items()
        if key in shares
    ]


def start_wishes(seconds: Mapping[Contender, float]) -> list[Wish]:
    """Our start over that of each peer that loads what we load."""
    ours = seconds.get(Contender(OURS, "bf16"))
    theirs = {peer: seconds.get(Contender(peer, "bf16")) for peer in (TRANSFORMERS, VLLM)}
    return [
        Wish("start, load to ready", peer, ours / other, 1.0, at_most=True)
        for peer, other in theirs.items()
        if ours is not None and other is not None
    ]


def memory_wishes(pss: Mapping[Contender, int], weight_bytes: Mapping[Precision, float]) -> list[Wish]:
    """All our processes together over the weights as they are kept."""
    return [
        Wish(f"memory, {precision}", "the weights' bytes", pss[ours] / size, MEMORY, at_most=True)
        for precision, size in weight_bytes.items()
        if (ours := Contender(OURS, precision)) in pss
    ]
