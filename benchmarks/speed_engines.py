"""The engines that are compared: each is started in processes of its own, asked, and ended."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from benchmarks.arrivals import Arrival
from benchmarks.open_loop import Gateway, Served
from benchmarks.peers import llamacpp
from benchmarks.speed_cases import Case, Times
from benchmarks.speed_figures import Precision
from benchmarks.speed_watch import Processes

PATIENCE_S = 1800.0
"""For one start or one run: vLLM compiles for minutes."""

_GONE_S = 120.0
_LOOK_S = 0.02
_MEMORY_LOOK_S = 2.0
_PEERS = Path(__file__).parent / "peers"


class EngineFailed(Exception):
    """It did not start, or did not answer; the text says why and where its log is."""


class Engine(ABC):
    """One engine, started when it is made, as ``processes``. ``versions``: of what it is made of; ``stays``: it is
    loaded once, for all cases. EngineFailed if it does not start."""

    stays = True

    def __init__(self, processes: Processes, log: Path) -> None:
        self.processes = processes
        self.versions: dict[str, str] = {}
        self._log = log

    @abstractmethod
    def run(self, case: Case, prompts: list[list[int]]) -> Times:
        """Answer all prompts at once; EngineFailed if it cannot."""

    def expert_rows(self) -> list[list[int]]:
        """Rows that went to each expert of each MoE layer so far; empty where nobody counts them."""
        return []

    def memory(self) -> int:
        """PSS bytes of all its processes together."""
        return self.processes.pss()

    def close(self) -> None:
        """End it; none of its processes is left afterwards."""
        self.processes.wait_gone(_GONE_S)

    def _failed(self, what: str) -> EngineFailed:
        lines = self._log.read_text(errors="replace").splitlines()[-3:] if self._log.exists() else []
        return EngineFailed(f"{what}; its log is {self._log}, whose last lines are: {' | '.join(lines)}")


class _Spawned(Engine):
    """An engine with a first process whose stdout is read line by line; its stderr goes to the log."""

    def __init__(
        self, processes: Processes, log: Path, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        super().__init__(processes, log)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=self.processes.environment | (environment or {}),
                start_new_session=True,
            )
        self._unread = b""

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _line(self) -> str:
        """Its next line; EngineFailed if it ends or says nothing for PATIENCE_S."""
        until = time.monotonic() + PATIENCE_S
        while b"\n" not in self._unread:
            if not select.select([self._stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise self._failed(f"nothing was said for {PATIENCE_S:g} s")
            more = os.read(self._stdout.fileno(), 1 << 16)
            if not more:
                raise self._failed(f"it ended with status {self._process.wait()}")
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode(errors="replace")

    def close(self) -> None:
        """See :class:`Engine`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.send_signal(signal.SIGINT)
        super().close()
        self._process.wait()
        self._stdout.close()


class Ours(_Spawned):
    """``expertmesh serve`` as it is shipped, asked over gRPC."""

    def __init__(self, processes: Processes, log: Path, config: dict[str, Any]) -> None:
        file = log.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config))
        super().__init__(processes, log, [sys.executable, "-m", "cluster.cli.main", "serve", "--config", str(file)])
        try:
            while (match := re.search(r"is ready: .* at (\S+) \(gRPC\)", self._line())) is None:
                pass
        except BaseException:
            self.close()
            raise
        self._target = match[1]

    def run(self, case: Case, prompts: list[list[int]]) -> Times:
        """See :class:`Engine`."""
        return asyncio.run(self._run(case, prompts))

    def expert_rows(self) -> list[list[int]]:
        """See :class:`Engine`."""
        return asyncio.run(self._expert_rows())

    async def _expert_rows(self) -> list[list[int]]:
        gateway = Gateway(self._target)
        try:
            return await gateway.expert_rows()
        finally:
            await gateway.close()

    async def _run(self, case: Case, prompts: list[list[int]]) -> Times:
        """Prompts are computed beside running streams: so in a decode case the first streams go on until the last one
        has its tokens too."""
        gateway = Gateway(self._target)
        try:
            context = (await gateway.model()).context_length
            most = context - case.prompt if case.kind == "decode" else case.new
            began = time.monotonic()
            arrivals = [Arrival(0.0, tuple(ids), most, case.kind == "batch") for ids in prompts]
            running = [Served(arrival) for arrival in arrivals]
            tasks = [asyncio.create_task(gateway.serve(one.arrival, began, one)) for one in running]
            if case.kind == "decode":
                await _until_all_had(running, tasks, case.new)
                for task in tasks:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await gateway.close()
        for one in running:
            if one.error:
                raise self._failed(f"{case.name}: {one.error}: {one.details}")
        return [one.token_at for one in running]


async def _until_all_had(running: Sequence[Served], tasks: Sequence[asyncio.Task[Served]], tokens: int) -> None:
    """Return when each stream had so many tokens since the last one's first; or when one has ended."""
    while not any(task.done() for task in tasks):
        if all(one.token_at for one in running):
            began = max(one.token_at[0] for one in running)
            if all(sum(at >= began for at in one.token_at) >= tokens for one in running):
                return
        await asyncio.sleep(_LOOK_S)


class Scripted(_Spawned):
    """A peer behind a script of ``peers/``, which runs in that peer's own Python."""

    def __init__(
        self,
        processes: Processes,
        log: Path,
        python: Path,
        script: str,
        arguments: Sequence[str],
        environment: dict[str, str] | None = None,
    ) -> None:
        super().__init__(processes, log, [str(python), str(_PEERS / script), *arguments], environment)
        try:
            self.versions = json.loads(self._line())["versions"]
        except BaseException:
            self.close()
            raise

    def run(self, case: Case, prompts: list[list[int]]) -> Times:
        """See :class:`Engine`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new": case.new}).encode() + b"\n")
        self._process.stdin.flush()
        times: Times = json.loads(self._line())["times"]
        return times


class BatchedBench(Engine):
    """llama.cpp: each case is a process of its own, which maps the file anew."""

    stays = False

    def __init__(self, processes: Processes, log: Path, folder: Path, precision: Precision) -> None:
        super().__init__(processes, log)
        self._folder, self._precision = folder, precision
        self._most_memory = 0

    def run(self, case: Case, prompts: list[list[int]]) -> Times:
        """See :class:`Engine`. It takes as many prompts, of its own."""
        command = llamacpp.arguments(self._folder, self._precision, case, len(os.sched_getaffinity(0)))
        with self._log.open("w") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=self.processes.environment
            )
        found = llamacpp.result(self._watched(process))
        if process.returncode or found is None:
            raise self._failed(f"{case.name}: llama-batched-bench ended with status {process.returncode}")
        return llamacpp.times(case, found)

    def memory(self) -> int:
        """See :class:`Engine`: the most that was seen while it ran."""
        return self._most_memory

    def _watched(self, process: subprocess.Popen[str]) -> str:
        """What it printed."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return process.communicate(timeout=_MEMORY_LOOK_S)[0]
            except subprocess.TimeoutExpired:
                self._most_memory = max(self._most_memory, self.processes.pss())
                if time.monotonic() > until:
                    process.kill()
