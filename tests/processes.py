"""Commands as a user types them, in processes that are always ended."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

EXPERTMESH = str(Path(sys.executable).with_name("expertmesh"))


def run(*arguments: str, timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """``expertmesh ARGUMENTS`` to its end."""
    return subprocess.run(
        [EXPERTMESH, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **environment},
        check=False,
    )


class Serving:
    """A running ``expertmesh serve``."""

    def __init__(self, process: subprocess.Popen[str], ready: str, errors: list[str]) -> None:
        self.process = process
        self.errors = errors
        self.ready = ready
        self.address = ready.split(" at ")[1].split(";")[0].split(" ")[0]
        self.http = ready.split("://")[1].split("/v1")[0] if "://" in ready else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def starting(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """``expertmesh serve ARGUMENTS`` from its first moment on."""
    process = subprocess.Popen(
        [EXPERTMESH, "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def serving(*arguments: str, timeout_s: float = 90, **environment: str) -> Iterator[Serving]:
    """``expertmesh serve ARGUMENTS`` from its ready line on."""
    lines: queue.Queue[str] = queue.Queue()
    errors: list[str] = []
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(starting(*arguments, **environment))
        for stream, take in ((process.stdout, lines.put), (process.stderr, errors.append)):
            reader = threading.Thread(target=_read, args=(stream, take))
            reader.start()
            stack.callback(reader.join)
        stack.callback(process.terminate)
        try:
            ready = lines.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no ready line within {timeout_s:g} s: {''.join(errors)}") from None
        assert ready, f"it ended before it was ready: {''.join(errors)}"
        yield Serving(process, ready, errors)


def _read(stream: IO[str], take: Callable[[str], object]) -> None:
    for line in stream:
        take(line)
    take("")
