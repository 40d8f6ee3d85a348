"""What an actor tells about wires that it has lost, to whoever waits for that in a control call."""

from __future__ import annotations

import threading

Known = tuple[int, frozenset[str]]
"""Epoch of the expert map that it is about (0 where there is none), and the names of the lost peers."""


class Losses:
    """The latest word, and a question that is answered when it changes. Any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._now: Known = (0, frozenset())
        self._ended = False
        self._told = threading.Condition()

    @property
    def now(self) -> Known:
        """The latest word."""
        return self._now

    def tell(self, epoch: int, lost: frozenset[str]) -> None:
        """This is what holds now."""
        with self._told:
            self._now = (epoch, lost)
            self._told.notify_all()

    def wait(self, known: Known, timeout_s: float) -> Known:
        """The latest word, as soon as it is not ``known``, or after ``timeout_s``. RuntimeError once this is closed."""
        with self._told:
            self._told.wait_for(lambda: self._now != known or self._ended, timeout_s)
            if self._ended:
                raise RuntimeError(f"{self._name} is stopped")
            return self._now

    def close(self) -> None:
        """Nobody waits any more. Idempotent."""
        with self._told:
            self._ended = True
            self._told.notify_all()
