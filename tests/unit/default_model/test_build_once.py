from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.default_model.build_once import build_once


def write(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "file").write_text(text)


def visible(folder: Path) -> list[str]:
    """Everything but the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_builds_once(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    assert build_once(target, write("first")) == target
    build_once(target, write("second"))
    assert (target / "file").read_text() == "first"
    assert visible(target.parent) == ["target"]


def test_anew_replaces(tmp_path: Path) -> None:
    target = tmp_path / "target"
    build_once(target, write("first"))
    with (target / "file").open() as still_open:
        build_once(target, write("second"), anew=True)
        assert still_open.read() == "first"
    assert (target / "file").read_text() == "second"
    assert visible(tmp_path) == ["target"]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(target, fail)
    assert visible(tmp_path) == []
    build_once(target, write("whole"))
    with pytest.raises(KeyboardInterrupt):
        build_once(target, fail, anew=True)
    assert (target / "file").read_text() == "whole"
    assert visible(tmp_path) == ["target"]


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for suffix in ("partial", "retired"):
        (tmp_path / f".target.{suffix}").mkdir()
        (tmp_path / f".target.{suffix}" / "stale").write_text("x")
    build_once(target, write("whole"))
    assert visible(tmp_path) == ["target"]
    assert visible(target) == ["file"]


def test_the_second_asker_waits_and_does_not_build(tmp_path: Path) -> None:
    target = tmp_path / "target"
    building, waiting = threading.Event(), threading.Event()

    def slow_build(folder: Path) -> None:
        building.set()
        assert waiting.wait(timeout=30)
        assert not target.exists()
        (folder / "file").write_text("first")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build_once, target, slow_build)
        assert building.wait(timeout=30)
        second = pool.submit(build_once, target, write("second"), on_wait=waiting.set)
        assert first.result(timeout=30) == second.result(timeout=30) == target
    assert (target / "file").read_text() == "first"
