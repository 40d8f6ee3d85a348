"""The thread that repairs: what it is told, when it tries again, how it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import supervisor
from cluster.roster import Stopping
from cluster.supervisor import Supervisor, pause_s

PATIENCE = 10.0


class Log:
    """Notes what the supervisor does; ``fail`` makes as many repairs fail."""

    def __init__(self) -> None:
        self.examined: list[frozenset[str]] = []
        self.repaired: list[list[Any]] = []
        self.errors: list[Exception] = []
        self.fail = 0
        self.rounds = threading.Semaphore(0)
        self.supervisor = Supervisor(self.examine, self.repair, self.failed)

    def examine(self, suspects: frozenset[str]) -> None:
        self.examined.append(suspects)
        if "really dead" in suspects:
            self.supervisor.lost("member")  # type: ignore[arg-type]
        else:
            self.rounds.release()

    def repair(self, lost: list[Any]) -> None:
        self.repaired.append(lost)
        self.rounds.release()
        if self.fail:
            self.fail -= 1
            raise OSError("no room")

    def failed(self, error: Exception) -> None:
        self.errors.append(error)

    def wait(self) -> None:
        assert self.rounds.acquire(timeout=PATIENCE)


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    log.supervisor.start()
    yield log
    log.supervisor.stop()


def test_each_loss_is_repaired_once(log: Log) -> None:
    log.supervisor.lost("a")  # type: ignore[arg-type]
    log.wait()
    log.supervisor.lost("b")  # type: ignore[arg-type]
    log.wait()
    log.supervisor.stop()
    assert log.repaired == [["a"], ["b"]]


def test_suspects_are_examined_and_repaired_in_the_same_round(log: Log) -> None:
    log.supervisor.suspect(frozenset({"really dead"}))
    log.wait()
    log.supervisor.suspect(frozenset({"alive"}))
    log.wait()
    log.supervisor.stop()
    assert log.examined == [{"really dead"}, {"alive"}]
    assert log.repaired == [["member"]]


def test_a_failed_repair_is_tried_again_with_the_same(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_RETRY_S", 0.0)
    log.fail = 2
    log.supervisor.lost("a")  # type: ignore[arg-type]
    for _ in range(3):
        log.wait()
    log.supervisor.stop()
    assert log.repaired == [["a"]] * 3
    assert [str(error) for error in log.errors] == ["no room"] * 2


def test_suspects_are_not_forgotten_when_examining_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_RETRY_S", 0.0)
    log = Log()

    def examine(suspects: frozenset[str]) -> None:
        log.examined.append(suspects)
        if len(log.examined) < 3:
            raise OSError("no wire")
        log.rounds.release()

    log.supervisor = Supervisor(examine, log.repair, log.failed)
    log.supervisor.start()
    log.supervisor.suspect(frozenset({"a"}))
    log.wait()
    log.supervisor.stop()
    assert log.examined == [{"a"}] * 3
    assert len(log.errors) == 2


def test_who_is_lost_is_replaced_though_examining_others_fails() -> None:
    log = Log()

    def examine(suspects: frozenset[str]) -> None:
        raise OSError("no wire")

    log.supervisor = Supervisor(examine, log.repair, log.failed)
    log.supervisor.suspect(frozenset({"a"}))
    log.supervisor.lost("b")  # type: ignore[arg-type]
    log.supervisor.start()
    log.wait()
    log.supervisor.stop()
    assert log.repaired == [["b"]]


def test_news_ends_the_wait_for_a_retry(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_RETRY_S", 3600.0)
    log.fail = 1
    log.supervisor.lost("a")  # type: ignore[arg-type]
    log.wait()
    log.supervisor.lost("b")  # type: ignore[arg-type]
    log.wait()
    log.supervisor.stop()
    assert log.repaired == [["a"], ["a", "b"]]


def test_what_dies_again_and_again_is_repaired_30_times_in_150_seconds() -> None:
    begun: list[float] = []
    now = 100.0
    for _ in range(200):
        now += pause_s(begun, now) + 0.1
        begun.append(now)
    assert begun[29] - begun[0] < 3
    windows = [later - earlier for earlier, later in zip(begun, begun[30:], strict=False)]
    assert min(windows) >= 150
    assert pause_s(begun, now + 150) == 0


def test_a_cluster_that_stops_is_not_repaired() -> None:
    log = Log()

    def repair(lost: list[Any]) -> None:
        log.rounds.release()
        raise Stopping("the cluster is being stopped")

    log.supervisor = Supervisor(log.examine, repair, log.failed)
    log.supervisor.start()
    log.supervisor.lost("a")  # type: ignore[arg-type]
    log.wait()
    log.supervisor.stop()
    assert log.errors == []
