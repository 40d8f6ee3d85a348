"""The rounds: everybody in turn, a disturbed run again, a failure told and the rest gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import speed_runs
from benchmarks.speed_cases import Case, Times, parse_case
from benchmarks.speed_engines import Engine, EngineFailed
from benchmarks.speed_figures import ONE_PROCESS, OURS, Contender
from benchmarks.speed_runs import Entry, Rounds
from benchmarks.speed_watch import Processes

CASE = parse_case("decode-1")
FIRST, SECOND = Contender(OURS, "bf16"), Contender(ONE_PROCESS, "bf16")


class Fake(Engine):
    """Answers in equal steps; ``log`` notes what it was asked."""

    def __init__(self, processes: Processes, name: str, asked: list[str]) -> None:
        super().__init__(processes, Path("none"))
        self.versions = {"fake": "1"}
        self._name, self._asked = name, asked
        asked.append(f"{name} started")

    def run(self, case: Case, prompts: list[list[int]]) -> Times:
        self._asked.append(f"{self._name} {case.name}")
        return [[float(1 + step) for step in range(case.new)] for _ in prompts]

    def memory(self) -> int:
        return len(self._asked)

    def close(self) -> None:
        self._asked.append(f"{self._name} ended")


class Cores:
    """In the place of Others: says the next of ``cores``, then 0."""

    def __init__(self, cores: list[float]) -> None:
        self._left = cores

    def __call__(self, processes: Processes) -> Cores:
        return self

    def __enter__(self) -> Cores:
        self.cores = self._left.pop(0) if self._left else 0.0
        return self

    def __exit__(self, *_: object) -> None:
        return None


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_runs, "Others", Cores([]))


def entry(contender: Contender, start: Callable[[Processes], Engine], needed: float = 0.0) -> Entry:
    return Entry(contender, start, [], needed)


def rounds(entries: list[Entry], said: list[str] | None = None) -> Rounds:
    return Rounds(entries, [CASE], 1000, 3, 0.1, (said if said is not None else []).append)


def test_only_one_engine_is_there_at_a_time_and_the_order_turns() -> None:
    asked: list[str] = []
    going = rounds([entry(one, lambda p, n=n: Fake(p, n, asked)) for one, n in ((FIRST, "a"), (SECOND, "b"))])
    going.run(0)
    going.run(1)
    a, b = ([f"{name} started", f"{name} batch-2x16", f"{name} decode-1", f"{name} ended"] for name in ("a", "b"))
    assert asked == a + b + b + a
    assert [sample.round_number for sample in going.seen.samples] == [0, 0, 1, 1]
    assert going.seen.versions == {OURS: {"fake": "1"}, ONE_PROCESS: {"fake": "1"}}
    assert going.seen.starts[0].pss == 3


@pytest.mark.parametrize(
    ("cores", "runs", "kept"), [([0.5, 0.2, 0.05, 0.0], 3, 0.05), ([0.5, 0.1], 2, 0.1), ([0.9, 0.3, 0.4], 3, 0.3)]
)
def test_a_disturbed_run_is_tried_again_and_the_quietest_kept(
    cores: list[float], runs: int, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_runs, "Others", Cores([0.0, *cores]))
    asked: list[str] = []
    going = rounds([entry(FIRST, lambda p: Fake(p, "a", asked))])
    going.run(0)
    assert asked.count("a decode-1") == runs
    assert [sample.other_cpu for sample in going.seen.samples] == [kept]


def test_who_fails_is_told_and_the_next_one_goes_on() -> None:
    asked: list[str] = []

    def fail(processes: Processes) -> Engine:
        raise EngineFailed("it ended with status 1")

    said: list[str] = []
    going = rounds([entry(FIRST, fail), entry(SECOND, lambda p: Fake(p, "b", asked))], said)
    going.run(0)
    assert going.seen.failures == {(FIRST, "decode-1"): "it ended with status 1"}
    assert "expertmesh, bf16: it ended with status 1" in said
    assert asked[-1] == "b ended"


def test_who_does_not_fit_in_memory_is_not_started() -> None:
    going = rounds([entry(FIRST, lambda p: pytest.fail("started"), needed=1e18)])
    going.run(0)
    assert "needs about" in going.seen.failures[FIRST, "decode-1"]


def test_an_engine_whose_case_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Fake, "memory", lambda self: (_ for _ in ()).throw(EngineFailed("gone")))
    rounds([entry(FIRST, lambda p: Fake(p, "a", asked))]).run(0)
    assert asked[-1] == "a ended"


def test_too_few_tokens_are_a_failure_of_that_case(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Fake, "run", lambda self, case, prompts: [[1.0] for _ in prompts])
    going = rounds([entry(FIRST, lambda p: Fake(p, "a", asked))])
    going.run(0)
    assert "decode-1: 1 streams with [1] tokens" in going.seen.failures[FIRST, "decode-1"]
    assert going.seen.samples == []
