"""Waiting for a cluster: backoff, patience, and the door where rows wait together."""

from __future__ import annotations

import asyncio

import pytest

from cluster.batch.backoff import FIRST_S, LONGEST_S, Backoff
from cluster.batch.door import Door
from cluster.batch.errors import OutOfPatience
from cluster.batch.patience import Patience
from tests.unit.batch.scripted import Time


def test_backoff_doubles_up_to_a_limit() -> None:
    longest = Backoff(lambda: 1.0)
    waits = [longest.next() for _ in range(10)]
    assert waits[:3] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert waits[-1] == LONGEST_S
    shortest = Backoff(lambda: 0.0)
    assert shortest.next(at_least_s=3.0) == 3.0 + FIRST_S / 2


def test_patience_counts_only_trouble() -> None:
    time = Time()
    patience = Patience(10, time)
    time.now = 100.0
    patience.trouble("a")
    time.now = 110.0
    patience.trouble("b")
    assert patience.lasting(10) == "b"
    assert patience.lasting(11) == ""
    patience.progress()
    assert patience.lasting(0) == ""
    time.now = 200.0
    patience.trouble("c")
    time.now = 210.5
    with pytest.raises(OutOfPatience, match=r"no token came for 10 s .*: d"):
        patience.trouble("d")


def test_trouble_that_goes_and_comes_again_adds_up() -> None:
    time = Time()
    patience = Patience(10, time)
    for _ in range(5):
        patience.trouble("a")
        time.now += 2
        patience.calm()
        assert patience.lasting(0) == ""
        time.now += 1000
    patience.trouble("b")
    assert patience.lasting(10) == "b"
    time.now += 0.5
    with pytest.raises(OutOfPatience, match=r"no token came for 10 s .*: c"):
        patience.trouble("c")


async def test_one_asks_for_all_and_late_news_do_not_close_the_door() -> None:
    time, asked, troubles = Time(), [], ["away", "away"]

    async def probe() -> str:
        asked.append(time.now)
        return troubles.pop() if troubles else ""

    door = Door(probe, Patience(100, time), time.sleep)
    assert [await door.enter() for _ in range(3)] == [0, 0, 0]
    assert asked == []
    door.lost(0)
    assert await asyncio.gather(*(door.enter() for _ in range(5))) == [1] * 5
    assert len(asked) == 3
    door.lost(0)  # of the same outage
    assert await door.enter() == 1
    assert len(asked) == 3
    door.lost(1)
    assert await door.enter() == 2
    assert len(asked) == 4
