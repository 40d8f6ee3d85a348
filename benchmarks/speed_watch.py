"""What an engine's processes take of the machine, and what others take meanwhile: read from /proc."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

_MARK = "EXPERTMESH_BENCH_MARK"
_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_LOOK_S = 0.1


def parent_and_ticks(stat: str) -> tuple[int, int]:
    """Of /proc/PID/stat: the parent's id, and CPU ticks of the process and of its children that have ended."""
    after_name = stat[stat.rindex(")") + 2 :].split()
    return int(after_name[1]), sum(int(ticks) for ticks in after_name[11:15])


def busy_and_stolen_ticks(stat: str) -> tuple[int, int]:
    """Of /proc/stat: what all processes and interrupts took since the machine's start, and what the hypervisor did."""
    user, nice, system, _, _, irq, softirq, stolen = (int(word) for word in stat.splitlines()[0].split()[1:9])
    return user + nice + system + irq + softirq, stolen


def pss_bytes(rollup: str) -> int:
    """Of /proc/PID/smaps_rollup: its memory, with its part of what it shares with others."""
    return next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)


def family(parents: dict[int, int], heads: Iterable[int]) -> set[int]:
    """``heads`` and all that descend from them; ``parents``: the parent of each process."""
    found = {pid for pid in heads if pid in parents}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


class Processes:
    """Those of one engine: marked, or descending from one that is. Processes that write their title over their
    environment, as Ray's do, are found by their parents. ``environment``: in which the first one is to be started."""

    def __init__(self) -> None:
        mark = uuid.uuid4().hex
        self.environment = os.environ | {_MARK: mark}
        self._entry = f"{_MARK}={mark}".encode()

    def ids(self) -> set[int]:
        """Those that are there now."""
        parents, marked = {}, []
        for pid in (int(path.name) for path in _PROC.iterdir() if path.name.isdigit()):
            stat = _read(pid, "stat")
            if stat:
                parents[pid] = parent_and_ticks(stat.decode(errors="replace"))[0]
                if self._entry in _read(pid, "environ").split(b"\0"):
                    marked.append(pid)
        return family(parents, marked)

    def cpu_seconds(self) -> float:
        """Of those that are there, and of their children that have ended."""
        stats = (_read(pid, "stat").decode(errors="replace") for pid in self.ids())
        return sum(parent_and_ticks(stat)[1] for stat in stats if stat) / _TICKS

    def pss(self) -> int:
        """Bytes of all together."""
        return sum(pss_bytes(_read(pid, "smaps_rollup").decode()) for pid in self.ids())

    def wait_gone(self, patience_s: float) -> None:
        """Return when none is left; those that are after ``patience_s`` are killed."""
        until = time.monotonic() + patience_s
        while self.ids() and time.monotonic() < until:
            time.sleep(_LOOK_S)
        while left := self.ids():
            for pid in left:
                _kill(pid)
            time.sleep(_LOOK_S)


class Others:
    """Cores that others take while a block runs: neither the engine nor this process and its children that have ended.
    What the hypervisor gave to other machines counts too."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.cores = 0.0

    def __enter__(self) -> Others:
        self._began, self._before = time.monotonic(), self._taken()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self._began
        self.cores = max(0.0, (self._taken() - self._before) / max(seconds, 1 / _TICKS))

    def _taken(self) -> float:
        own = self._processes.cpu_seconds() + sum(os.times()[:4])
        return sum(busy_and_stolen_ticks((_PROC / "stat").read_text())) / _TICKS - own


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    lines = (_PROC / "meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _read(pid: int, name: str) -> bytes:
    """Nothing of a process that is gone, or another user's."""
    try:
        return (_PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
