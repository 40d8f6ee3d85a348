"""The loop: rows out, results to disk, so many at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import grpc
from expertmesh.v1 import inference_pb2 as pb

from cluster.batch.answers import Result
from cluster.batch.door import Door
from cluster.batch.errors import BatchError, Changed
from cluster.batch.gateway import Gateway
from cluster.batch.job import Job
from cluster.batch.manifest import Manifest, describe_model, model_differences
from cluster.batch.patience import Patience
from cluster.batch.results import Committer
from cluster.batch.rows import Row
from cluster.batch.sender import Sender
from cluster.batch.tally import Tally

_READ_AHEAD = 64


@dataclass(frozen=True)
class Limits:
    """``concurrency``: rows at the gateway at the same time. ``retries`` of a row after its first attempt."""

    concurrency: int
    retries: int


async def run_job(job: Job, gateway: Gateway, limits: Limits, patience: Patience, stop: asyncio.Event) -> None:
    """Answer every row that has no result, or end early when ``stop`` is set; what was answered is on disk then.

    Raises BatchError.
    """
    committer = Committer()
    try:
        await _until(stop, _begin_and_answer(job, gateway, limits, patience, committer))
    finally:
        await committer.drain()


async def _begin_and_answer(
    job: Job, gateway: Gateway, limits: Limits, patience: Patience, committer: Committer
) -> None:
    manifest = job.begin(describe_model(await _model(gateway)))
    door = Door(lambda: _why_not_ready(gateway, manifest), patience)
    sender = Sender(gateway, door, patience, manifest, limits.retries, job.tally)
    await _answer_all(job, sender, committer, limits.concurrency)


async def _answer_all(job: Job, sender: Sender, committer: Committer, concurrency: int) -> None:
    rows: asyncio.Queue[Row | None] = asyncio.Queue(_READ_AHEAD)
    enough = threading.Event()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(_work(job, rows, sender, committer))
            pending = job.pending(enough)
            # on the way past what is finished in a big input: not in the loop that serves the streams
            while some := await asyncio.to_thread(_take, pending):
                for row in some:
                    await rows.put(row)
            for _ in range(concurrency):
                await rows.put(None)
    except BaseExceptionGroup as errors:
        expected, bugs = errors.split(BatchError)
        if expected is None or bugs is not None:
            raise
        raise _first(expected) from None
    finally:
        enough.set()  # a thread cannot be cancelled, and the process waits for it


async def _work(job: Job, rows: asyncio.Queue[Row | None], sender: Sender, committer: Committer) -> None:
    """One row after the other."""
    while (row := await rows.get()) is not None:
        result = await sender.answer(row)
        line = result.line(row.custom_id, sender.request_id(row))
        file = job.results if result.good else job.errors
        await committer.commit(file, line, partial(_count, job.tally, result))


def _count(tally: Tally, result: Result) -> None:
    tally.answered += result.good
    tally.failed += not result.good
    tally.prompt_tokens += result.prompt_tokens
    tally.completion_tokens += result.completion_tokens


def _first(errors: BaseExceptionGroup[BatchError]) -> BatchError:
    """Several rows may find the same."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _take(pending: Iterator[Row]) -> list[Row]:
    return list(islice(pending, _READ_AHEAD))


async def _until(stop: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Work to the end, or until ``stop`` is set. Raises what the work raises."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        unfinished = working.cancel()
        await asyncio.wait((working,))
    if not (unfinished and working.cancelled()):
        working.result()


async def _model(gateway: Gateway) -> pb.GetModelInfoResponse:
    try:
        return await gateway.model()
    except grpc.RpcError as error:
        raise BatchError(gateway.unanswered(error)) from None


async def _why_not_ready(gateway: Gateway, manifest: Manifest) -> str:
    """As the gateway's own; one that came back with another model ends the run. Raises BatchError."""
    trouble = await gateway.why_not_ready()
    if not trouble:
        try:
            changed = model_differences(manifest.model, describe_model(await gateway.model()))
        except grpc.RpcError as error:
            return gateway.unanswered(error)
        if changed:
            raise Changed("this batch", changed)
    return trouble
