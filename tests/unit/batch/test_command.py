"""The command around the loop: signals, and what it says of an end before the end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from cluster.batch.job import Job, Wanted, open_job
from cluster.batch.run import Limits
from cluster.cli import batch
from cluster.cli.connection import Connection


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(files: tuple[Path, Path]) -> int:
    return batch.run_batch(Connection("127.0.0.1:1"), *files, Wanted(), Limits(1, 0), 1.0)


def test_a_second_signal_does_not_wait(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def stubborn(job: Job, *rest: object) -> None:
        *_, stop = rest
        assert isinstance(stop, asyncio.Event)
        os.kill(os.getpid(), signal.SIGINT)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr(batch, "run_job", stubborn)
    assert run(files) == 130
    assert "stopped: 0 of 1 rows are finished and on disk; the same command goes on" in capsys.readouterr().err


def test_stopped_when_all_is_done(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_job(*files, Wanted()) as job:
        job.begin({})
        job.results.append([b'{"custom_id": "a"}\n'])

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "summary", interrupted)
    assert run(files) == 130
    assert capsys.readouterr().err == "stopped: 1 of 1 rows are finished and on disk\n"


def test_stopped_while_the_input_is_read(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "open_job", interrupted)
    assert run(files) == 130
    assert capsys.readouterr().err == "stopped before anything was sent\n"
