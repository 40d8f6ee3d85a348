"""Commands as a user types them, in processes that are always ended."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        self.address = ready.split(" at ")[1].split(";")[0]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(*arguments: str, timeout_s: float = 90, **environment: str) -> Iterator[Serving]:
    """``expertmesh serve ARGUMENTS`` from its ready line on."""
    process = subprocess.Popen(
        [EXPERTMESH, "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    readers = [
        threading.Thread(target=lambda out=process.stdout: [lines.put(line) for line in out] and None),
        threading.Thread(target=lambda err=process.stderr: errors.extend(err)),
    ]
    for reader in readers:
        reader.start()
    try:
        try:
            ready = lines.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no ready line within {timeout_s:g} s: {''.join(errors)}") from None
        yield Serving(process, ready, errors)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for reader in readers:
            reader.join()
        process.stdout.close()
        process.stderr.close()
