"""The rounds of a comparison: one engine after the other, each in every case, with what others took meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.speed_cases import Case, figure, prompts
from benchmarks.speed_engines import Engine, EngineFailed
from benchmarks.speed_figures import Contender, Sample, Start
from benchmarks.speed_plan import shortages, turn
from benchmarks.speed_watch import Others, Processes, available_bytes

_WARM_UP = Case("batch", 2, 16, 4)
_CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """How a contender is started: ``start`` does it, as the processes it is given; ``files`` are what it loads,
    ``needed`` bytes of memory."""

    contender: Contender
    start: Callable[[Processes], Engine]
    files: Sequence[Path]
    needed: float


@dataclass
class Seen:
    """All that was measured, and why the rest was not."""

    samples: list[Sample] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    failures: dict[tuple[Contender, str], str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    expert_rows: list[list[int]] = field(default_factory=list)


class Rounds:
    """``attempts``: so often a run is tried that others disturb with more than ``limit`` cores. ``say`` takes
    progress."""

    def __init__(
        self,
        entries: Sequence[Entry],
        cases: Sequence[Case],
        vocabulary: int,
        attempts: int,
        limit: float,
        say: Callable[[str], None],
    ) -> None:
        self.seen = Seen()
        self._entries = {entry.contender: entry for entry in entries}
        self._cases, self._vocabulary, self._say = cases, vocabulary, say
        self._attempts, self._limit = attempts, limit

    def run(self, number: int) -> None:
        """One round: only one engine is loaded at a time."""
        for contender in turn(list(self._entries), number):
            entry = self._entries[contender]
            try:
                self._engine(entry, number)
            except EngineFailed as failure:
                self._say(f"{contender.label}, {contender.precision}: {failure}")
                for case in self._cases:
                    self.seen.failures.setdefault((contender, case.name), str(failure))

    def _engine(self, entry: Entry, number: int) -> None:
        contender = entry.contender
        if short := shortages({contender: entry.needed}, available_bytes()):
            raise EngineFailed(short[0])
        self._say(f"round {number + 1}: {contender.label}, {contender.precision}")
        _read_through(entry.files)
        processes, began = Processes(), time.monotonic()
        with Others(processes) as others:
            engine = entry.start(processes)
        try:
            ready_s = time.monotonic() - began if engine.stays else None
            engine.run(_WARM_UP, prompts(_WARM_UP, self._vocabulary, number, 0))
            most = engine.memory()
            for case in self._cases:
                self._case(engine, contender, case, number)
                most = max(most, engine.memory())
            self.seen.starts.append(Start(contender, number, ready_s, most, others.cores))
            self.seen.versions[contender.engine] = engine.versions
            self.seen.expert_rows = engine.expert_rows() or self.seen.expert_rows
        finally:
            engine.close()

    def _case(self, engine: Engine, contender: Contender, case: Case, number: int) -> None:
        """The attempt that was disturbed least counts."""
        tried: list[Sample] = []
        for attempt in range(self._attempts):
            ids = prompts(case, self._vocabulary, number, attempt)
            with Others(engine.processes) as others:
                times = engine.run(case, ids)
            try:
                found = figure(case, times)
            except ValueError as error:
                self.seen.failures[contender, case.name] = str(error)
                return
            tried.append(Sample(contender, case.name, number, found, others.cores))
            self._say(f"  {case.name}: {found.rate:.1f} tokens/s, others used {others.cores:.2f} cores")
            if others.cores <= self._limit:
                break
        self.seen.samples.append(min(tried, key=lambda sample: sample.other_cpu))


def _read_through(files: Sequence[Path]) -> None:
    """So that whoever starts finds them in memory, as far as there is room: a start is not a test of the disk."""
    buffer = bytearray(_CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
