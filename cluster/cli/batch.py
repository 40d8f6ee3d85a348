"""``expertmesh batch run``: a file of requests to a running cluster, with progress, a summary and an exit status."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.batch.errors import BatchError
from cluster.batch.gateway import KEEPALIVE, Gateway
from cluster.batch.job import Job, Wanted, open_job
from cluster.batch.patience import Patience
from cluster.batch.run import Limits, run_job
from cluster.batch.tally import Tally
from cluster.cli.client import explain, open_aio_channel
from cluster.cli.connection import Connection
from cluster.cli.terminal import complain

_STOPPED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REDRAW_S = 0.25
_LINE_S = 10.0
_TROUBLE_S = 3.0


def run_batch(
    connection: Connection, requests: Path, output: Path, wanted: Wanted, limits: Limits, patience_s: float
) -> int:
    """Answer every row; the exit status: 0 all of them, 1 not all, 130 stopped."""
    with ExitStack() as stack:
        try:
            job = stack.enter_context(open_job(requests, output, wanted))
        except BatchError as error:
            return complain(str(error))
        except KeyboardInterrupt:
            _say("stopped before anything was sent")
            return _STOPPED
        try:
            return _run(job, connection, limits, patience_s)
        except KeyboardInterrupt:
            return _stopped(job.tally)


def _run(job: Job, connection: Connection, limits: Limits, patience_s: float) -> int:
    for note in job.notes:
        _say(note)
    tally, began = job.tally, time.monotonic()
    if tally.left > 0:
        try:
            asyncio.run(_answer(job, connection, limits, Patience(patience_s)))
        except BatchError as error:
            status = complain(str(error))
            if tally.finished:
                _say(_how_to_go_on(tally))
            return status
    if tally.left > 0:
        return _stopped(tally)
    print(summary(tally, time.monotonic() - began), flush=True)
    if tally.all_failed:
        _say(f"failed rows: {tally.all_failed}, see {job.errors.path}; --retry-failed does them again")
    return 1 if tally.all_failed else 0


async def _answer(job: Job, connection: Connection, limits: Limits, patience: Patience) -> None:
    """Until all rows are answered, or SIGINT or SIGTERM comes. A second one does what it does to any process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop_in_order() -> None:
        stop.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop_in_order)
    async with open_aio_channel(connection, KEEPALIVE) as channel, _shown(job.tally, patience):
        gateway = Gateway(channel, connection.token, lambda error: explain(error, connection))
        await run_job(job, gateway, limits, patience, stop)


def summary(tally: Tally, seconds: float) -> str:
    """The last line."""
    earlier = tally.earlier + tally.earlier_failed
    repeated = f", {tally.repeated} attempts repeated" if tally.repeated else ""
    return (
        f"{tally.rows} rows ({earlier} finished earlier), {tally.all_failed} failed{repeated}; {tally.prompt_tokens} "
        f"prompt and {tally.completion_tokens} completion tokens in {seconds:.1f} s, "
        f"{_rate(tally.completion_tokens, seconds)}"
    )


@asynccontextmanager
async def _shown(tally: Tally, patience: Patience) -> AsyncIterator[None]:
    """Progress on stderr meanwhile: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    showing = asyncio.create_task(_bar(console, tally, patience) if console.is_terminal else _lines(tally, patience))
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.wait((showing,))


async def _lines(tally: Tally, patience: Patience) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(_LINE_S)
        seconds = time.monotonic() - began
        done = tally.answered + tally.failed
        left = f", about {seconds / done * tally.left:.0f} s left" if done else ""
        _say(f"{tally.finished}/{tally.rows} rows, {_rates(tally, seconds)}{left}{_trouble(patience)}")


async def _bar(console: Console, tally: Tally, patience: Patience) -> None:
    began = time.monotonic()
    text = TextColumn("{task.description}", markup=False)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text, console=console) as progress:
        task = progress.add_task("", total=tally.rows, completed=tally.finished)

        def redraw() -> None:
            told = _rates(tally, time.monotonic() - began) + _trouble(patience)
            progress.update(task, completed=tally.finished, description=told)

        try:
            while True:
                redraw()
                await asyncio.sleep(_REDRAW_S)
        finally:
            redraw()


def _rates(tally: Tally, seconds: float) -> str:
    return f"{tally.all_failed} failed, {_rate(tally.streamed, seconds)}"


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if seconds else "0.0 tokens/s"


def _trouble(patience: Patience) -> str:
    trouble = patience.lasting(_TROUBLE_S)
    return f"; waiting: {trouble}" if trouble else ""


def _stopped(tally: Tally) -> int:
    _say(f"stopped: {_how_to_go_on(tally)}")
    return _STOPPED


def _how_to_go_on(tally: Tally) -> str:
    others = "; the same command goes on with the others" if tally.left > 0 else ""
    return f"{tally.finished} of {tally.rows} rows are finished and on disk{others}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
