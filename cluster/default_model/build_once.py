"""A folder that is made once, whole or not at all, whoever asks for it at the same time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def build_once(
    target: Path,
    build: Callable[[Path], object],
    *,
    anew: bool = False,
    on_wait: Callable[[], None] = lambda: None,
) -> Path:
    """``target``, filled by ``build(folder)`` unless it exists already (``anew``: even then).

    Processes that ask together build one after the other, so all but the first find it finished;
    ``on_wait`` is called if another one is at it. ``build`` fills a hidden sibling of ``target``, which is
    flushed to the disk and then renamed: ``target`` exists only when it is complete. What an interrupted
    build left is removed by the next one. Whatever ``build`` raises is passed on.
    """
    if target.is_dir() and not anew:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock"), on_wait):
        if target.is_dir() and not anew:
            return target
        partial = target.with_name(f".{target.name}.partial")
        retired = target.with_name(f".{target.name}.retired")
        for leftover in (partial, retired):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        try:
            build(partial)
            _flush(partial)
            _swap(partial, target, retired)
        finally:
            # Gone already after the rename; after a failure it would hold on to the disk space.
            shutil.rmtree(partial, ignore_errors=True)
    return target


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on ``path``. The kernel frees it when the holder dies; the empty file stays."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _swap(partial: Path, target: Path, retired: Path) -> None:
    """Put ``partial`` in the place of ``target``; who has the old files open keeps them."""
    if target.exists():
        target.rename(retired)
    partial.rename(target)
    _fsync(target.parent)
    if retired.exists():
        shutil.rmtree(retired)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
