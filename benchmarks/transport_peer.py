"""Processes of the wires' benchmark: forked from one that has torch already, so that 20 of them cost a second."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

PATIENCE_S = 60.0
SECRET = b"a benchmark's secret"
NODE = "node"

_context = get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.transport_peer", "benchmarks.transport_layer"])


class Peer:
    """``function(connection, *args)`` in a process of its own, which ends at the latest with this one."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        self._connection, theirs = _context.Pipe()
        with theirs:
            self._process = _context.Process(target=function, args=(theirs, *args), daemon=True)
            self._process.start()

    def send(self, message: Any) -> None:
        """Give it something to ``connection.recv()``."""
        self._connection.send(message)

    def recv(self, patience_s: float = PATIENCE_S) -> Any:
        """What it sent. Errors: TimeoutError; EOFError if it ended instead."""
        if not self._connection.poll(patience_s):
            raise TimeoutError(f"process {self._process.pid} said nothing for {patience_s:g} s")
        return self._connection.recv()

    def call(self, message: Any) -> Any:
        """send and recv."""
        self.send(message)
        return self.recv()

    def close(self) -> None:
        """Let it end: its next ``recv`` raises EOFError. Killed if it does not."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def until_closed(connection: Connection, answer: Callable[[Any], Any]) -> None:
    """In a peer: answer each message, until the benchmark closes the pipe."""
    while True:
        try:
            message = connection.recv()
        except (EOFError, ConnectionError):
            return
        connection.send(answer(message))


def pin(core: int) -> None:
    """Keep this thread on one of the cores that it may use (the first after the last)."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
