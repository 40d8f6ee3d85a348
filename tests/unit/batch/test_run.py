"""The loop over a scripted gateway."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from expertmesh.v1 import inference_pb2 as pb

from cluster.batch import job as job_module
from cluster.batch.errors import BatchError, Changed
from cluster.batch.job import Wanted, errors_path, open_job
from cluster.batch.patience import Patience
from cluster.batch.rows import Input, Row, read_rows
from cluster.batch.run import Limits, run_job
from cluster.batch.tally import Tally
from cluster.gateway import errors
from tests.unit.batch.scripted import ScriptedGateway, lost, messages, refusal


class Echo(ScriptedGateway):
    """Answers any number of rows; those whose prompt is "wait" when it is told to. ``waiting``: four of them run."""

    def __init__(self) -> None:
        super().__init__()
        self.running = self.most = 0
        self.go_on = asyncio.Event()
        self.waiting = asyncio.Event()

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """See Gateway."""
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if request.prompt == "wait":
                if self.running == 4:
                    self.waiting.set()
                await self.go_on.wait()
            if request.prompt == "bad":
                raise refusal(errors.InvalidRequest("prompt", "is bad"))
            for message in messages([1]):
                await asyncio.sleep(0)
                yield message
        finally:
            self.running -= 1


def write(folder: Path, *prompts: str) -> tuple[Path, Path]:
    requests = folder / "in.jsonl"
    rows = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}}
        for n, prompt in enumerate(prompts)
    ]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return requests, folder / "out.jsonl"


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


async def run(files: tuple[Path, Path], gateway: ScriptedGateway, stop: asyncio.Event | None = None) -> Tally:
    with open_job(*files, Wanted()) as job:
        await run_job(job, gateway, Limits(concurrency=4, retries=0), Patience(10), stop or asyncio.Event())
        return job.tally


async def test_every_row_once_good_and_bad_apart(tmp_path: Path) -> None:
    files = write(tmp_path, *(["x", "x", "bad"] * 70))
    gateway = Echo()
    tally = await run(files, gateway)
    assert (tally.answered, tally.failed, tally.left) == (140, 70, 0)
    assert (tally.prompt_tokens, tally.completion_tokens, tally.streamed) == (420, 140, 140)
    assert sorted(map(int, ids(files[1]))) == [n for n in range(210) if n % 3 != 2]
    assert sorted(map(int, ids(errors_path(files[1])))) == [n for n in range(210) if n % 3 == 2]
    failed = json.loads(errors_path(files[1]).read_text().splitlines()[0])
    assert failed["error"] is None
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["param"] == "prompt"


async def test_stopped_in_the_middle_keeps_what_is_finished(tmp_path: Path) -> None:
    files = write(tmp_path, "x", "wait", "wait", "wait", "wait", "x")
    gateway, stop = Echo(), asyncio.Event()
    running = asyncio.create_task(run(files, gateway, stop))
    await gateway.waiting.wait()
    stop.set()
    tally = await running
    assert (gateway.running, gateway.most) == (0, 4)
    assert ids(files[1]) == ["0"]
    assert tally.left == 5
    gateway.go_on.set()
    assert (await run(files, gateway)).left == 0
    assert sorted(ids(files[1])) == ["0", "1", "2", "3", "4", "5"]


async def test_stopped_before_the_gateway_answers(tmp_path: Path) -> None:
    asked = asyncio.Event()

    class Silent(ScriptedGateway):
        async def model(self) -> pb.GetModelInfoResponse:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

    stop = asyncio.Event()
    running = asyncio.create_task(run(write(tmp_path, "x"), Silent(), stop))
    await asked.wait()
    stop.set()
    assert (await running).left == 1


async def test_to_stop_ends_the_way_past_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, *["x"] * 3)
    await run(files, Echo())
    on_the_way, never, stop = threading.Event(), threading.Event(), asyncio.Event()
    seen: list[int] = []

    def slow(file: BinaryIO, given: Input) -> Iterator[tuple[bytes, Row]]:
        (first, *_) = read_rows(file, given)
        for count in range(5000):
            seen.append(count)
            on_the_way.set()
            never.wait(0.001)
            yield first

    monkeypatch.setattr(job_module, "read_rows", slow)
    running = asyncio.create_task(run(files, Echo(), stop))
    await asyncio.to_thread(on_the_way.wait)
    stop.set()
    await running
    await asyncio.get_running_loop().shutdown_default_executor()
    assert len(seen) < 5000


async def test_a_gateway_that_comes_back_with_another_model(tmp_path: Path) -> None:
    files = write(tmp_path, "x")
    gateway = ScriptedGateway([lost()])
    asked = 0
    honest = gateway.model

    async def model() -> pb.GetModelInfoResponse:
        nonlocal asked
        asked += 1
        return await honest() if asked == 1 else pb.GetModelInfoResponse(model="tiny", dtype="bfloat16")

    gateway.model = model  # type: ignore[method-assign]
    with open_job(*files, Wanted()) as job, pytest.raises(Changed, match="model dtype:  → bfloat16"):
        await run_job(job, gateway, Limits(1, 5), Patience(10), asyncio.Event())


async def test_no_gateway_at_the_start(tmp_path: Path) -> None:
    class Nobody(ScriptedGateway):
        async def model(self) -> pb.GetModelInfoResponse:
            raise lost("refused")

    files = write(tmp_path, "x")
    with pytest.raises(BatchError, match="UNAVAILABLE: refused"):
        await run(files, Nobody())


async def test_a_disk_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, *["x"] * 50)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "out.jsonl")

    with open_job(*files, Wanted()) as job:
        monkeypatch.setattr(job.results, "append", fail)
        with pytest.raises(BatchError, match=r"out\.jsonl: cannot be written: No space left on device"):
            await run_job(job, Echo(), Limits(4, 0), Patience(10), asyncio.Event())
        assert job.tally.answered == 0


async def test_a_bug_is_not_taken_for_a_failed_row(tmp_path: Path) -> None:
    class Broken(ScriptedGateway):
        async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
            raise ZeroDivisionError
            yield

    with pytest.raises(ExceptionGroup) as caught:
        await run(write(tmp_path, "x"), Broken())
    assert caught.group_contains(ZeroDivisionError)
