"""The adaptive wait, on a clock of its own."""

from __future__ import annotations

import math

import pytest

from actors.transport import waiting
from actors.transport.waiting import Waiter


class World:
    """A clock in microseconds; each look costs 1, each yield ``slice_us``; news comes at ``news_at``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.news_at = math.inf
        self.slice_us = 1.0
        self.looks = 0
        self.blocks: list[float] = []

    def monotonic(self) -> float:
        return self.now * 1e-6

    def sched_yield(self) -> None:
        self.now += self.slice_us

    def poll(self, seconds: float) -> list[object]:
        self.now += 1.0
        self.looks += 1
        if seconds > 0.0:
            self.blocks.append(seconds)
            self.now = max(self.now, min(self.now + seconds * 1e6, self.news_at + 30.0))
        return [object()] if self.now >= self.news_at else []

    def run(self, waiter: Waiter, news_in_us: float) -> bool:
        self.news_at = self.now + news_in_us
        return bool(waiter.wait(self.poll, self.monotonic() + 1.0))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(waiting.time, "monotonic", world.monotonic)
    monkeypatch.setattr(waiting.os, "sched_yield", world.sched_yield)
    return world


def test_quick_news_never_blocks(world: World) -> None:
    waiter = Waiter(50.0)
    for _ in range(20):
        assert world.run(waiter, 20.0)
    assert world.blocks == []
    assert waiter.budget_us == pytest.approx(50.0)


def test_polling_shrinks_to_nothing_when_it_never_pays(world: World) -> None:
    waiter = Waiter(50.0)
    for _ in range(10):
        assert world.run(waiter, 5000.0)
    assert waiter.budget_us == 0.0
    world.looks = 0
    assert world.run(waiter, 5000.0)
    assert world.looks == 1


def test_polling_grows_back_when_it_would_pay(world: World) -> None:
    waiter = Waiter(50.0)
    for _ in range(10):
        world.run(waiter, 5000.0)
    for _ in range(4):
        assert world.run(waiter, 20.0)
    assert waiter.budget_us == pytest.approx(50.0)
    world.blocks.clear()
    assert world.run(waiter, 20.0)
    assert world.blocks == []


def test_polling_abstains_where_a_yield_costs_a_time_slice_and_returns(world: World) -> None:
    waiter = Waiter(50.0)
    world.slice_us = 4000.0
    polled = 0
    for _ in range(5000):
        polled += waiter.budget_us > 0.0
        assert world.run(waiter, 20.0)
    assert polled <= 10
    world.slice_us = 1.0
    for _ in range(1025):
        world.run(waiter, 20.0)
    assert waiter.budget_us == pytest.approx(50.0)


def test_the_deadline_ends_it_even_an_infinite_wait_is_sliced(world: World) -> None:
    waiter = Waiter(50.0)
    assert not waiter.wait(world.poll, 0.5)
    assert world.monotonic() == pytest.approx(0.5, abs=1e-4)
    assert not waiter.wait(world.poll, 0.0)
    world.news_at = world.now + 2 * 3600e6
    assert waiter.wait(world.poll, math.inf)
    assert max(world.blocks) == 3600.0


def test_zero_never_polls(world: World) -> None:
    waiter = Waiter(0.0)
    for news in (1.0, 10.0, 10.0):
        world.looks = 0
        assert world.run(waiter, news)
        assert world.looks == 1
    with pytest.raises(ValueError, match="spin_us is -1"):
        Waiter(-1)
