"""The output: one result a line, appended, and on disk before it counts. Whatever kills the process, and whenever, the
lines that counted are whole and still there; at most the last one is torn, and is cut off at the next start."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.batch.errors import BatchError
from cluster.batch.manifest import sync_folder
from cluster.batch.rows import key_of


class ResultFile:
    """One file of results, held by this process alone: the lock goes with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """Open or create it. Raises BatchError when another run has it or it is no regular file, and OSError."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            sync_folder(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._descriptor).st_size

    def repair(self) -> int:
        """Cut off what follows the last end of a line. Returns how many bytes that were. Raises OSError."""
        whole = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
        torn = self.size - whole
        if torn:
            self._cut(whole)
        return torn

    def finished(self) -> set[bytes]:
        """``key_of`` each row that has a result here. Raises BatchError for a line that is none."""
        keys: set[bytes] = set()
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                custom_id = _custom_id(line)
                if custom_id is None:
                    raise BatchError(f"{self.path}: line {number} is no result; delete it, and its row is done again")
                key = key_of(custom_id)
                if key in keys:
                    raise BatchError(f"{self.path}: line {number} is a second result of {custom_id!r}; delete one")
                keys.add(key)
        return keys

    def append(self, lines: Sequence[bytes]) -> None:
        """Write each line with its end, in one write each, and return when all are on disk.

        Raises OSError; then none of them counts, and as far as the disk lets us none is there.
        """
        before = self.size
        with self._named():
            try:
                for line in lines:
                    self._write(line)
                os.fsync(self._descriptor)
            except OSError:
                # a torn end that stays is cut off at the next start; the first error is the one that tells why
                with contextlib.suppress(OSError):
                    self._cut(before)
                raise

    def clear(self) -> None:
        """Forget all results. Raises OSError."""
        with self._named():
            self._cut(0)

    def close(self) -> None:
        """Let go of the file and its lock."""
        os.close(self._descriptor)

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise BatchError(f"{self.path}: not a regular file")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"{self.path}: another `expertmesh batch run` is writing it") from None

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Calls on a descriptor do not know the file's name."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _write(self, line: bytes) -> None:
        """The kernel may take less than all of it, when the disk is nearly full."""
        left = memoryview(line)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def _cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)


@dataclass
class _Waiting:
    """A line on its way to disk; ``done`` once it is there."""

    file: ResultFile
    line: bytes
    counted: Callable[[], None]
    done: asyncio.Future[None]


class Committer:
    """Results of many rows to disk: those that come while the disk is busy share its next sync."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None

    async def commit(self, file: ResultFile, result: dict[str, Any], counted: Callable[[], None]) -> None:
        """Return when the result is on disk; ``counted`` is called then, even if the caller was cancelled meanwhile.
        Raises BatchError."""
        # ASCII: other characters, too, are ends of lines to some readers (U+2028, U+0085)
        line = json.dumps(result, separators=(",", ":")).encode() + b"\n"
        one = _Waiting(file, line, counted, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        writing = self._writing
        await asyncio.wait((one.done, writing), return_when=asyncio.FIRST_COMPLETED)
        if not one.done.done():
            writing.result()

    async def drain(self) -> None:
        """Return when everything that was handed in is on disk. Raises BatchError if it could not be written."""
        if self._writing is not None:
            await self._writing

    async def _write(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                await asyncio.to_thread(_append, group)
                for one in group:
                    one.counted()
                    if not one.done.done():
                        one.done.set_result(None)
        except OSError as error:
            # self._writing stays: whoever commits or drains after this gets the same error
            raise BatchError(f"{error.filename}: cannot be written: {error.strerror}") from None
        self._writing = None


def _append(lines: Sequence[_Waiting]) -> None:
    for file in {id(one.file): one.file for one in lines}.values():
        file.append([one.line for one in lines if one.file is file])


def _custom_id(line: bytes) -> str | None:
    try:
        found = json.loads(line)
        custom_id = found.get("custom_id") if isinstance(found, dict) else None
        if isinstance(custom_id, str):
            custom_id.encode()  # half of a surrogate pair: no row has such an id
            return custom_id
    except ValueError:
        pass
    return None
