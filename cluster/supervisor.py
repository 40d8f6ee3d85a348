"""The thread that repairs: it waits for losses, lets the controller replace what was lost, and retries if it must."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.roster import Member, Stopping

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 1.0
_LONGEST_RETRY_S = 30.0
_MOST_REPAIRS = 30
_IN_S = 150.0


class Supervisor:
    """Calls ``repair(lost)`` with everybody who was lost and not yet replaced, until it has returned once for each;
    and before, ``examine(suspects)`` with the names of those who were reported and may be dead or not.

    ``repair`` raises when something could not be replaced; ``failed(error)`` is told then, and it is tried again after
    a delay that doubles each time, and at once when there is other news. Should what was replaced die again and again,
    there are at most 30 repairs in 150 s.
    """

    def __init__(
        self,
        examine: Callable[[frozenset[str]], None],
        repair: Callable[[list[Member]], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._examine = examine
        self._repair = repair
        self._failed = failed
        self._lost: list[Member] = []
        self._suspects: frozenset[str] = frozenset()
        self._reports = 0
        self._news = threading.Condition()
        self._stopping = False
        self._delay_s = _FIRST_RETRY_S
        self._rounds: deque[float] = deque(maxlen=_MOST_REPAIRS)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """From now on losses are repaired; those told before, too."""
        self._thread.start()

    def lost(self, member: Member) -> None:
        """Somebody has died. From any thread."""
        with self._news:
            self._lost.append(member)
            self._report()

    def suspect(self, names: frozenset[str]) -> None:
        """Some may have died. From any thread."""
        with self._news:
            self._suspects |= names
            self._report()

    def stop(self) -> None:
        """End the thread; a repair under way ends with its own error. Idempotent."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _report(self) -> None:
        self._reports += 1
        self._delay_s = _FIRST_RETRY_S
        self._news.notify_all()

    def _run(self) -> None:
        while self._wait():
            known = self._reports
            try:
                self._work()
            except Stopping:
                return
            except Exception as error:  # whatever keeps it from working now may be over later
                log.warning("repair failed", exc_info=True)
                self._failed(error)
                self._wait_to_retry(known)

    def _wait(self) -> bool:
        """True as soon as there is something to do, False to stop."""
        with self._news:
            self._news.wait_for(lambda: bool(self._lost or self._suspects) or self._stopping)
            return not self._stopping

    def _slow_down(self) -> None:
        now = time.monotonic()
        if (wait_s := pause_s(self._rounds, now)) > 0:
            log.warning("actors are lost again and again; the next repair begins in %.0f s", wait_s)
            with self._news:
                self._news.wait_for(lambda: self._stopping, wait_s)
        self._rounds.append(time.monotonic())

    def _work(self) -> None:
        failure = self._examine_suspects() if self._suspects else None
        if lost := list(self._lost):
            self._slow_down()
            self._repair(lost)
            with self._news:
                del self._lost[: len(lost)]
        if failure is not None:
            raise failure

    def _examine_suspects(self) -> Exception | None:
        with self._news:
            suspects, self._suspects = self._suspects, frozenset()
        try:
            self._examine(suspects)
        except Stopping:
            raise
        except Exception as error:  # those who are lost are to be replaced all the same
            with self._news:
                self._suspects |= suspects  # nobody reports them a second time
            return error
        return None

    def _wait_to_retry(self, known: int) -> None:
        until = time.monotonic() + self._delay_s
        self._delay_s = min(2 * self._delay_s, _LONGEST_RETRY_S)
        with self._news:
            self._news.wait_for(lambda: self._reports > known or self._stopping, until - time.monotonic())


def pause_s(begun: Sequence[float], now: float) -> float:
    """Seconds to wait before the next repair. ``begun``: when repairs began, oldest first (monotonic seconds)."""
    if len(begun) < _MOST_REPAIRS:
        return 0.0
    return max(0.0, begun[-_MOST_REPAIRS] + _IN_S - now)
