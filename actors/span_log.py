"""What an actor does, and when: recorded only while somebody traces the cluster (see ``cluster/tracer.py``).

    began = spans.begin()
    ...
    if began:
        spans.end("gate", began, layer=3)

Without a recording that is one call and one comparison.
"""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LOOP = "loop"
"""The lane of what an actor's data-plane thread does."""

FORWARD, ROWS_OUT, WAIT, HEAD, SAMPLE, PUBLISH = "forward", "rows out", "wait for experts", "head", "sample", "publish"
"""What an attention shard tells of a step; what lies between is computing: see ``cluster/compute_spans.py``."""

_CAPACITY = 200_000

Row = tuple[str, str, int, int, dict[str, int]]


class Span(NamedTuple):
    """Something that was done, on the actor's own monotonic clock. Spans of one ``lane`` follow or contain each
    other."""

    name: str
    lane: str
    start_ns: int
    duration_ns: int
    numbers: dict[str, int]

    @property
    def end_ns(self) -> int:
        """When it was done."""
        return self.start_ns + self.duration_ns


@dataclass(frozen=True)
class Recording:
    """The spans of an actor, in the order in which they ended; ``dropped`` more were not kept. ``clock``: by which
    clock, see ``clock_name``. ``rows``: the spans' fields as plain tuples, of which many are pickled four times as
    fast, and meanwhile the actor does nothing else."""

    pid: int
    clock: str
    rows: list[Row]
    dropped: int

    @property
    def spans(self) -> list[Span]:
        """As what they are."""
        return [Span(*row) for row in self.rows]


class SpanLog:
    """One thread does what is recorded; any thread may start and take recordings."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        """At most ``capacity`` spans of a recording are kept, the first ones."""
        self._capacity = capacity
        self._on = False
        self._armed = False  # recording begins with the next step
        self._since_ns = 0
        self._until_ns = math.inf
        self._limit_steps = 0
        self._steps = 0
        self._rows: list[Row] = []
        self._dropped = 0
        self._over = threading.Event()
        self._switching = threading.Lock()

    # -- who is recorded ------------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        """Whether something is recorded, or will be with the next step."""
        return self._on or self._armed

    def begin(self) -> int:
        """Monotonic nanoseconds now; 0 while nothing is recorded."""
        if not self._on:
            return 0
        now_ns = time.monotonic_ns()
        return now_ns if now_ns <= self._until_ns else self._expire()

    def end(self, name: str, began_ns: int, lane: str = LOOP, /, **numbers: int) -> None:
        """What began at ``began_ns``, as ``begin`` told it, has ended."""
        if began_ns < self._since_ns:
            return  # begun in an earlier recording
        if len(self._rows) >= self._capacity:
            self._dropped += 1
            return
        self._rows.append((name, lane, began_ns, time.monotonic_ns() - began_ns, numbers))

    def begin_step(self) -> int:
        """As ``begin``, and a recording of steps that waits for a whole one begins here."""
        if self._armed:
            with self._switching:
                self._on, self._armed = self._on or self._armed, False
        return self.begin()

    def end_step(self, began_ns: int, **numbers: int) -> None:
        """A step has ended; a recording of steps ends with the last that it wants."""
        if began_ns < self._since_ns:
            return
        self.end("step", began_ns, **numbers)
        self._steps += 1
        if self._steps == self._limit_steps:
            self._on = False
            self._over.set()

    # -- who wants to know ----------------------------------------------------------------------------------------

    def start(self, limit_steps: int = 0, limit_s: float = math.inf) -> None:
        """Forget what was recorded, and record: until ``take``, or for so many whole steps.

        After ``limit_s`` whoever asked is gone: all is dropped, and nothing more is recorded.
        """
        with self._switching:
            self._on = False
            self._rows, self._dropped, self._steps = [], 0, 0
            self._over.clear()
            self._limit_steps, self._since_ns = limit_steps, time.monotonic_ns()
            self._until_ns = self._since_ns + limit_s * 1e9
            self._on, self._armed = not limit_steps, bool(limit_steps)

    def wait(self, timeout_s: float) -> None:
        """Return when the steps are recorded, the recording was taken, or after ``timeout_s``."""
        self._over.wait(timeout_s)

    def take(self) -> Recording:
        """Stop, and hand over what was recorded; nothing, if it was taken before."""
        with self._switching:
            self._on = self._armed = False
            rows, self._rows = self._rows, []
            self._over.set()
        return Recording(os.getpid(), clock_name(), rows, self._dropped)

    def _expire(self) -> int:
        """Nobody came for it. (Unless somebody just started another one.)"""
        with self._switching:
            now_ns = time.monotonic_ns()
            if self._on and now_ns > self._until_ns:
                self._on = False
                self._rows, self._dropped, self._since_ns = [], 0, now_ns
        return 0


class Recorded:
    """What every actor with a ``SpanLog`` offers to who traces the cluster."""

    _spans: SpanLog

    def clock(self) -> int:
        """Monotonic nanoseconds now."""
        return time.monotonic_ns()

    def start_spans(self, limit_steps: int = 0, limit_s: float = math.inf) -> None:
        """See ``SpanLog.start``."""
        self._spans.start(limit_steps, limit_s)

    def wait_for_steps(self, timeout_s: float) -> None:
        """See ``SpanLog.wait``."""
        self._spans.wait(timeout_s)

    def take_spans(self) -> Recording:
        """See ``SpanLog.take``."""
        return self._spans.take()


def clock_name() -> str:
    """Processes with the same name have the same monotonic clock: it counts from a machine's boot, whatever network
    and containers they are in, unless a time namespace shifts it."""
    namespace = Path("/proc/self/ns/time")
    shift = os.readlink(namespace) if namespace.is_symlink() else ""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() + shift
