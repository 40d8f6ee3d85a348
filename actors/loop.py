"""The data-plane thread of an actor: waits on all its wires, hands each frame to one handler."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from actors.transport.base import Frame, PeerGone, TransportError, Wire, WireTimeout
from actors.transport.poller import Express, Poller

log = logging.getLogger(__name__)

_IDLE_S = 60.0
_PAST = 0.0
"""A deadline: take what is here, and do not wait."""


class LoopThread:
    """Runs ``on_frame(wire, frame)`` for every frame and ``on_gone(wire, error)`` for every wire that ends.

    Handlers run one at a time in the loop's thread. A handler that raises a TransportError loses that wire alone;
    any other exception is a bug: it ends the loop, is logged, and is kept in ``failure``. ``next_deadline`` tells
    until when to wait at most (absolute monotonic seconds); ``on_tick`` runs after each wait. ``express`` serves common
    frames while it waits, in the loop's thread too.
    """

    def __init__(
        self,
        name: str,
        on_frame: Callable[[Wire, Frame], None],
        on_gone: Callable[[Wire, PeerGone], None],
        threads: int = 0,
        next_deadline: Callable[[], float] | None = None,
        on_tick: Callable[[], None] | None = None,
        express: Express | None = None,
    ) -> None:
        self._on_frame = on_frame
        self._on_gone = on_gone
        self._threads = threads
        self._use_threads()  # already now: other threads that begin later, to read weights, take the number over
        self._next_deadline = next_deadline or (lambda: time.monotonic() + _IDLE_S)
        self._on_tick = on_tick
        self._poller = Poller(express=express)
        self._wires: set[Wire] = set()
        self._joining: list[Wire] = []
        self._sent_before: Counter[str] = Counter()  # over wires that have ended, by medium
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-loop", daemon=True)
        self.failure: BaseException | None = None

    def add(self, wire: Wire) -> None:
        """Take over a wire. From any thread."""
        with self._lock:
            if self._stopping:
                wire.close()
                return
            self._joining.append(wire)
        self._poller.wake()

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def wake(self) -> None:
        """Make the loop run ``on_tick`` soon. From any thread."""
        self._poller.wake()

    def check(self) -> None:
        """Raise RuntimeError if an error has ended the loop."""
        if self.failure is not None:
            raise RuntimeError(f"the data-plane loop ended by an error: {self.failure!r}")

    def stop(self) -> None:
        """End the thread and close every wire. Idempotent, from any other thread."""
        with self._lock:
            self._stopping = True
        self._poller.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._close_all()

    def wires(self) -> list[Wire]:
        """The wires that are alive now, for statistics."""
        return list(self._wires)

    def bytes_sent(self) -> dict[str, int]:
        """Bytes sent since the start, by medium: over all wires that ever were here, so that no number falls."""
        with self._lock:
            sent = self._sent_before.copy()
            for wire in self._wires:
                sent[wire.medium.value] += wire.stats.bytes_sent
        return dict(sent)

    def drop(self, wire: Wire, error: PeerGone) -> None:
        """Forget a wire that turned out to be dead while it was used outside ``on_frame``. Loop thread only."""
        if wire in self._wires:
            with self._lock:
                self._wires.discard(wire)
                self._sent_before[wire.medium.value] += wire.stats.bytes_sent
            self._poller.remove(wire)
            wire.close()
            self._on_gone(wire, error)

    def _run(self) -> None:
        self._use_threads()
        try:
            with self._computing():
                while not self._stopping:
                    self._turn()
        except BaseException as error:
            self.failure = error
            self._stopping = True  # wires that come from now on are closed: their peers shall not wait for nothing
            log.exception("the data-plane loop ended by an error; its wires are closed")
            lost = list(self._wires)
            self._close_all()
            for wire in lost:
                self._on_gone(wire, PeerGone("the data-plane loop ended by an error"))

    def _use_threads(self) -> None:
        """Torch keeps the number for each thread, and for threads to come."""
        if self._threads:
            import torch

            torch.set_num_threads(self._threads)

    def _computing(self) -> AbstractContextManager[object]:
        """How handlers run: without threads to compute with they have no tensors, and the process no torch."""
        if not self._threads:
            return nullcontext()
        import torch

        return torch.inference_mode()

    def _turn(self) -> None:
        if self._joining:
            self._join()
        for wire in self._poller.wait(self._next_deadline()):
            if wire in self._wires:
                self._serve(wire)
        if self._on_tick is not None:
            self._on_tick()

    def _join(self) -> None:
        with self._lock:
            joining, self._joining = self._joining, []
            self._wires.update(joining)
        for wire in joining:
            self._poller.add(wire)

    def _serve(self, wire: Wire) -> None:
        try:
            frame = wire.recv(_PAST)
        except WireTimeout:
            return  # what had arrived was stale
        except TransportError as error:
            self.drop(wire, PeerGone(str(error)))
            return
        try:
            self._on_frame(wire, frame)
        except TransportError as error:
            self.drop(wire, PeerGone(str(error)))

    def _close_all(self) -> None:
        with self._lock:
            wires = [*self._wires, *self._joining]
            self._wires.clear()
            self._joining.clear()
        for wire in wires:
            wire.close()
        self._poller.close()
