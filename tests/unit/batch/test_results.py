"""The output: no finished row is lost, none is torn, and no two processes write it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.batch.errors import BatchError
from cluster.batch.results import Committer, ResultFile
from cluster.batch.rows import key_of

LINES = [json.dumps({"custom_id": name, "response": "größe"}).encode() + b"\n" for name in ("a", "b")]

HOLD = """
import sys
from pathlib import Path
from cluster.batch.results import ResultFile

held = ResultFile(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def file(path: Path) -> Iterator[ResultFile]:
    opened = ResultFile(path)
    yield opened
    opened.close()


def test_torn_at_every_byte(path: Path) -> None:
    whole = b"".join(LINES)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        file = ResultFile(path)
        kept = LINES[: whole[:size].count(b"\n")]
        assert file.repair() == size - len(b"".join(kept))
        assert file.finished() == {key_of(name) for name, _ in zip(("a", "b"), kept, strict=False)}
        file.append(LINES[len(kept) :])
        file.close()
        assert path.read_bytes() == whole


def test_lines_that_are_no_results(path: Path, file: ResultFile) -> None:
    half = b'{"custom_id": "\\ud800"}\n'
    for bad in (b"nope\n", b"[]\n", b'{"custom_id": 1}\n', b"\n", b"\x00\x00\n", b"\xff\n", half):
        path.write_bytes(LINES[0] + bad)
        with pytest.raises(BatchError, match=r"out\.jsonl: line 2 is no result; delete it, and its row is done again"):
            file.finished()


def test_two_results_of_a_row(path: Path, file: ResultFile) -> None:
    path.write_bytes(LINES[0] + LINES[1] + LINES[0])
    with pytest.raises(BatchError, match="line 3 is a second result of 'a'"):
        file.finished()


def test_one_process_at_a_time_and_the_lock_goes_with_it(path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BatchError, match="another `expertmesh batch run` is writing it"):
            ResultFile(path)
        holder.kill()
        holder.wait()
        ResultFile(path).close()


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BatchError, match="not a regular file"):
        ResultFile(tmp_path / "pipe")


def test_a_full_disk_leaves_no_torn_line(path: Path, file: ResultFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file.append(LINES[:1])
    honest = os.write
    room = [10]

    def write(descriptor: int, data: memoryview) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = honest(descriptor, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left") as caught:
        file.append(LINES[1:])
    assert caught.value.filename == str(path)
    assert path.read_bytes() == LINES[0]


async def test_a_disk_that_is_full_and_broken_tells_that_it_is_full(
    path: Path, file: ResultFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "ftruncate", broken)
    with pytest.raises(BatchError) as caught:
        await Committer().commit(file, {"custom_id": "a"}, lambda: None)
    assert str(caught.value) == f"{path}: cannot be written: No space left on device"


def test_short_writes_are_continued(path: Path, file: ResultFile, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: honest(descriptor, data[:3]))
    file.append(LINES)
    assert path.read_bytes() == b"".join(LINES)


class Disk:
    """Counts syncs, and can hold them up or let them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.syncs = 0
        self.error: OSError | None = None
        self._honest = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)

    def _sync(self, descriptor: int) -> None:
        self.syncs += 1
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self._honest(descriptor)


async def test_nothing_counts_before_it_is_on_disk(
    path: Path, file: ResultFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, committer = Disk(monkeypatch), Committer()
    counted: list[int] = []
    await committer.commit(file, {"custom_id": "a"}, lambda: counted.append(disk.syncs))
    assert counted == [1]
    assert path.read_bytes() == b'{"custom_id":"a"}\n'


async def test_results_that_come_together_share_a_sync(
    path: Path, file: ResultFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, committer = Disk(monkeypatch), Committer()
    many = [committer.commit(file, {"custom_id": f"{number}\u2028"}, lambda: None) for number in range(100)]
    await asyncio.gather(*many)
    assert disk.syncs <= 2
    assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] == [
        f"{number}\u2028" for number in range(100)
    ]


async def test_a_sync_that_fails_ends_the_run(path: Path, file: ResultFile, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, committer = Disk(monkeypatch), Committer()
    counted: list[str] = []
    await committer.commit(file, {"custom_id": "a"}, lambda: counted.append("a"))
    disk.error = OSError(errno.EIO, "Input/output error")
    failing = [committer.commit(file, {"custom_id": name}, lambda: counted.append("?")) for name in ("b", "c")]
    outcomes = await asyncio.gather(*failing, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == [f"{path}: cannot be written: Input/output error"] * 2
    with pytest.raises(BatchError, match="Input/output error"):
        await committer.commit(file, {"custom_id": "d"}, lambda: counted.append("?"))
    with pytest.raises(BatchError, match="Input/output error"):
        await committer.drain()
    assert counted == ["a"]
    assert path.read_bytes() == b'{"custom_id":"a"}\n'


async def test_what_was_handed_in_is_written_even_if_its_caller_is_gone(path: Path, file: ResultFile) -> None:
    committer = Committer()
    counted: list[str] = []
    caller = asyncio.create_task(committer.commit(file, {"custom_id": "a"}, lambda: counted.append("a")))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await committer.drain()
    assert counted == ["a"]
    assert path.read_bytes() == b'{"custom_id":"a"}\n'
