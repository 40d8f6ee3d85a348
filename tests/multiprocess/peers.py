"""Peer processes for tests: fresh interpreters that run one named function and obey commands over a pipe.

Not ``multiprocessing``: its spawned children re-import the test runner, and its parents wait for them at exit.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1


class Peer:
    """Runs ``function`` ("package.module:name") as ``function(connection, *args)`` in a process of its own.

    Use it as a context manager: whatever happened, the process is killed (stopped ones too) and reaped at the
    end. Arguments and messages are pickled.
    """

    def __init__(self, function: str, *args: Any) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.multiprocess.peers", str(theirs.fileno()), function],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
        self._connection.send(args)

    @property
    def pid(self) -> int:
        """The process's id, for ``os.kill``."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Give the function something to ``connection.recv()``."""
        self._connection.send(message)

    def recv(self, timeout: float = 20.0) -> Any:
        """What the function sent. Errors: TimeoutError; EOFError when the process ended instead."""
        if not self._connection.poll(timeout):
            raise TimeoutError(f"peer process {self.pid} said nothing for {timeout} s")
        return self._connection.recv()

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._process.kill()
        self._process.wait(20)

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def join(self, timeout: float = 20.0) -> int:
        """Wait for the function to return; the exit code. Errors: subprocess.TimeoutExpired."""
        return self._process.wait(timeout)

    def close(self) -> None:
        """Kill, reap and free. Idempotent."""
        self.kill()
        self._connection.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _main(descriptor: str, function: str) -> None:
    # Should the test runner itself be killed, its peers must not stay behind, stopped ones least of all.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    module, name = function.split(":")
    with Connection(int(descriptor)) as connection:
        getattr(importlib.import_module(module), name)(connection, *connection.recv())


if __name__ == "__main__":
    _main(*sys.argv[1:])
