"""The scheduler in seeded storms; see ``storm`` for what is checked after every step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from actors.engine.request import FinishReason

from .storm import Storm

EVENTS_PER_SEED = 2500
REGRESSION_SEEDS = json.loads(Path(__file__).with_name("regression_seeds.json").read_text())
SEEDS = [*range(42), *REGRESSION_SEEDS]


@pytest.fixture(scope="module")
def finished() -> list[Storm]:
    storms = [Storm(seed) for seed in SEEDS]
    for storm in storms:
        storm.run(EVENTS_PER_SEED)
    return storms


def test_every_promise_holds_in_every_storm(finished: list[Storm]) -> None:
    assert len(finished) * EVENTS_PER_SEED >= 100_000


def test_the_storms_hold_what_they_should(finished: list[Storm]) -> None:
    """A simulator that no longer reaches a case would pass in silence."""
    total: Counter[str] = sum((storm.counts for storm in finished), Counter())
    least = {
        "arrival": 3000,
        "followers": 1000,
        "stranger": 1000,
        "never fits": 100,
        "queue full": 100,
        "over its share": 50,
        "abort": 300,
        "preemption": 500,
        "hit tokens": 5000,
        "cached": 500,
        "eviction": 1000,
        "copy": 300,
        "failed step": 100,
        "failed chunk": 100,
        "no token": 50,
        "went bad": 50,
        "crash": 50,
        "piece": 1000,
        "piece on its way": 1000,
    }
    assert {event: n for event, n in least.items() if total[event] < n} == {}
    finishes = Counter(told[-1].finish for storm in finished for told in storm.told.values())
    assert all(finishes[reason] >= 50 for reason in FinishReason)


def test_a_storm_is_the_same_each_time(finished: list[Storm]) -> None:
    again = Storm(SEEDS[0])
    again.run(EVENTS_PER_SEED)
    assert again.told == finished[0].told
