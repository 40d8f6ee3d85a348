"""How members find their companions: the lobby of a shard."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from actors.transport.base import FrameTag, PeerGone, Wire, WireTimeout
from actors.transport.local import LocalNetwork
from actors.transport.nccl_group import GroupPlan
from actors.transport.nccl_join import Joined, Lobby, join_as_router, join_as_shard
from tests.multiprocess.transport.nccl_double import DoubleBackend

HELLO = 0xFFFE


class Town:
    """A shard's lobby, and routers that connect to it."""

    def __init__(self) -> None:
        self.network = LocalNetwork()
        self.lobby = Lobby()
        self.shard = self.network.endpoint("s", self.lobby.park)
        self.routers = {name: self.network.endpoint(name) for name in ("r0", "r1")}

    def call(self, router: str, epoch: int, kind: int = HELLO) -> Wire:
        wire = self.routers[router].connect(self.shard.address, soon())
        wire.send(kind, FrameTag(epoch=epoch), [], soon())
        return wire


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def plan(epoch: int) -> GroupPlan:
    return GroupPlan(epoch, b"", b"", b"", ("r0", "r1"), ("s",))


def gone(wire: Wire) -> bool:
    with pytest.raises(PeerGone):
        wire.recv(soon())
    return True


@pytest.fixture
def town() -> Iterator[Town]:
    town = Town()
    yield town
    town.lobby.close()


def test_each_plan_gets_the_wires_of_its_epoch(town: Town) -> None:
    stale = town.call("r0", 1)
    early = [town.call("r0", 3), town.call("r1", 3)]
    mine = [town.call("r1", 2), town.call("r0", 2)]
    taken = town.lobby.take(plan(2), soon())
    assert gone(stale)
    for router, wire in zip(("r1", "r0"), mine, strict=True):
        wire.send(9, FrameTag(), [router.encode()], soon())
        assert bytes(taken[router].recv(soon()).parts[0]) == router.encode()
    later = town.lobby.take(plan(3), soon())
    assert set(later) == {"r0", "r1"}
    for wire in (*taken.values(), *later.values(), *early, *mine, stale):
        wire.close()


def test_who_did_not_come_is_named_and_nothing_is_kept(town: Town) -> None:
    wire = town.call("r1", 2)
    with pytest.raises(WireTimeout, match="epoch 2: no wire from r0 before the deadline"):
        town.lobby.take(plan(2), soon(0.05))
    assert gone(wire)


def test_a_router_that_gave_up_or_talks_nonsense_is_passed_over(town: Town) -> None:
    town.routers["r0"].connect(town.shard.address, soon()).close()
    nonsense = town.call("r0", 2, kind=5)
    mine = [town.call("r0", 2), town.call("r1", 2)]
    taken = town.lobby.take(plan(2), soon())
    assert gone(nonsense)
    for wire in (*taken.values(), *mine):
        wire.close()


def test_a_closed_lobby_closes_what_nobody_took(town: Town) -> None:
    before = town.call("r0", 1)
    town.lobby.close()
    assert gone(before)
    assert gone(town.routers["r1"].connect(town.shard.address, soon()))


def test_a_router_that_cannot_join_leaves_no_wire(town: Town) -> None:
    backend = DoubleBackend()
    here = GroupPlan(1, backend.unique_id(), backend.unique_id(), backend.unique_id(), ("r0",), ("s",))
    with pytest.raises(WireTimeout, match="did not form"):
        join_as_router(here, "r0", town.routers["r0"], {"s": town.shard.address}, backend, soon(0.1))
    left = town.lobby.take(GroupPlan(1, b"", b"", b"", ("r0",), ("s",)), soon())
    assert gone(left["r0"])
    left["r0"].close()
    for name in (here.dispatch_id, here.results_id, here.rooms_id):  # the double answers for its ids until all came
        ranks = (1,) if name == here.dispatch_id else (0, 1)
        threads = [threading.Thread(target=lambda n=name, r=rank: backend.connect(n, r, 2).abort()) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)


def test_members_of_one_process_join(town: Town) -> None:
    backend = DoubleBackend()
    here = GroupPlan(1, backend.unique_id(), backend.unique_id(), backend.unique_id(), ("r0",), ("s",))
    made: list[Joined] = []
    thread = threading.Thread(target=lambda: made.append(join_as_shard(here, "s", town.lobby, backend, soon())))
    thread.start()
    router = join_as_router(here, "r0", town.routers["r0"], {"s": town.shard.address}, backend, soon())
    thread.join()
    router.wires["s"].send(3, FrameTag(), [b"x"], soon())
    assert made[0].wires["r0"].recv(soon()).kind == 3
    for joined in (router, *made):
        for wire in joined.wires.values():
            wire.close()
        joined.group.close()
