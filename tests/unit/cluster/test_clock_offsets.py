"""The offset of another machine's clock, over a network whose delays are drawn."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any

import pytest

from cluster.clock_offsets import ClockOffset, measure
from cluster.fleet import ActorHandle, ActorUnreachable


class Network:
    """Our clock; a question and its answer take their time on it."""

    def __init__(self, seed: int = 0) -> None:
        self.draw = random.Random(seed)
        self.now = 10**12
        self.round_trips: list[int] = []

    def now_ns(self) -> int:
        return self.now


class Distant(ActorHandle):
    """An actor whose clock is ``ahead`` of ours; with ``dead`` it never answers."""

    def __init__(self, network: Network, ahead: int, dead: bool = False) -> None:
        self.name = "distant"
        self.asked = 0
        self._network, self._ahead, self._dead = network, ahead, dead

    def begin(self, method: str, *args: Any) -> Future[Any]:
        assert (method, args) == ("clock", ())
        self.asked += 1
        answer: Future[Any] = Future()
        network = self._network
        there, back = (int(network.draw.expovariate(1e-6)) for _ in range(2))
        network.round_trips.append(there + back)
        network.now += there
        theirs = network.now + self._ahead
        network.now += back
        if self._dead:
            answer.set_exception(ActorUnreachable("gone"))
        else:
            answer.set_result(theirs)
        return answer


@pytest.mark.parametrize("ahead", [0, 123_456_789_000, -(10**11)])
@pytest.mark.parametrize("seed", range(20))
def test_the_offset_is_found_within_its_error(ahead: int, seed: int) -> None:
    network = Network(seed)
    found = measure([Distant(network, ahead)], network.now_ns)
    assert found is not None
    assert abs(found.offset_ns - ahead) <= found.error_ns
    assert found.error_ns == (min(network.round_trips) + 1) // 2


def test_an_answer_at_once_is_exact() -> None:
    assert measure([Distant(_Instant(), 77)], lambda: 5) == ClockOffset(72 + _Instant().now, 0)


class _Instant(Network):
    """Nothing takes any time."""

    def __init__(self) -> None:
        super().__init__()
        self.draw.expovariate = lambda _: 0  # type: ignore[method-assign,assignment]


def test_all_of_a_machine_are_asked_and_the_dead_do_not_matter() -> None:
    network = Network()
    alive, dead = Distant(network, 50), Distant(network, 10**15, dead=True)
    found = measure([dead, alive], network.now_ns)
    assert found is not None
    assert abs(found.offset_ns - 50) <= found.error_ns
    assert (alive.asked, dead.asked) == (4, 4)
    assert measure([dead], network.now_ns) is None
