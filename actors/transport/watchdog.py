"""The thread that watches what is on its way, since nothing else would ever tell that it hangs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from actors.transport.communicator import Pending

_YIELD_S = 100e-6
_LONGEST_NAP_S = 1e-3


class _Watched(NamedTuple):
    pending: Pending
    deadline: float
    what: str
    on_done: Callable[[], None]


class Watchdog:
    """Calls back when a posted exchange is done; finds the fault when one is late or the library reports an error.

    ``look`` returns what the library noticed, or None. ``fault(reason)`` is called in this thread, once: for the first
    late exchange, the first error, or because of ``bite``. The thread ends after it. Nothing waits while nothing is
    on its way.
    """

    def __init__(self, name: str, look: Callable[[], str | None], fault: Callable[[str], None]) -> None:
        self._look = look
        self._fault = fault
        self._changed = threading.Condition()
        self._watched: list[_Watched] = []
        self._bitten: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"{name}-watchdog", daemon=True)
        self._thread.start()

    def watch(self, pending: Pending, deadline: float, what: str, on_done: Callable[[], None]) -> None:
        """Look after ``pending`` until ``deadline`` (monotonic). ``what`` names it in the fault's reason."""
        with self._changed:
            self._watched.append(_Watched(pending, deadline, what, on_done))
            self._changed.notify()

    def stir(self) -> None:
        """What is pending is about to end: look often again. From any thread."""
        with self._changed:
            self._changed.notify()

    def bite(self, reason: str) -> None:
        """Have ``fault(reason)`` called, unless it was called already. From any thread; does not wait."""
        with self._changed:
            if self._bitten is None:
                self._bitten = reason
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end, after ``bite``. False when it did not come in time."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        idle_since = time.monotonic()
        while True:
            with self._changed:
                while not self._watched and self._bitten is None:
                    self._changed.wait()
                    idle_since = time.monotonic()
                reason, watched = self._bitten, list(self._watched)
            reason = reason or self._found_fault(watched)
            if reason is not None:
                self._fault(reason)
                return
            done = [item for item in watched if item.pending.done()]
            for item in done:
                self._retire(item)
            if done or self._stirred(time.monotonic() - idle_since):
                idle_since = time.monotonic()

    def _found_fault(self, watched: list[_Watched]) -> str | None:
        noticed = self._look()
        if noticed is not None:
            return noticed
        now = time.monotonic()
        late = (item for item in watched if item.deadline <= now and not item.pending.done())
        return next((f"{item.what} did not end before its deadline" for item in late), None)

    def _retire(self, item: _Watched) -> None:
        with self._changed:
            self._watched.remove(item)
        item.on_done()

    def _stirred(self, waited: float) -> bool:
        """Wait a little: yield at first, since most transfers take microseconds; then in ever longer, short naps.

        True when something new came meanwhile, or is about to end.
        """
        if waited < _YIELD_S:
            os.sched_yield()
            return False
        with self._changed:
            return self._changed.wait(min(waited / 2, _LONGEST_NAP_S))
