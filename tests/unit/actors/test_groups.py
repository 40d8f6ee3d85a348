"""An actor's groups: joined, left, and given up while they form."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from actors import groups
from actors.groups import Groups
from actors.transport.base import FrameTag, WireTimeout
from actors.transport.local import LocalNetwork
from actors.transport.nccl_group import GroupPlan
from actors.transport.nccl_join import Joined, Lobby
from tests.multiprocess.transport.nccl_double import DoubleBackend
from tests.waiting import until

CPU = torch.device("cpu")
PATIENCE = 30.0


class Pair:
    """A router and a shard."""

    def __init__(self) -> None:
        network = LocalNetwork()
        self.lobby = Lobby()
        self.shard_end = network.endpoint("s", self.lobby.park)
        self.router_end = network.endpoint("r")
        self.router, self.shard = Groups("r", CPU, PATIENCE), Groups("s", CPU, PATIENCE)
        self.pool = ThreadPoolExecutor(2)

    def plan(self, epoch: int) -> GroupPlan:
        return GroupPlan(epoch, *self.router.new_ids(), ("r",), ("s",))  # type: ignore[call-arg]

    def join_router(self, plan: GroupPlan) -> Joined:
        shards = {"s": self.shard_end.address}
        return self.router.join_as_router(plan, self.router_end, shards, None, PATIENCE)

    def form(self, epoch: int) -> tuple[Joined, Joined]:
        plan = self.plan(epoch)
        joining = self.pool.submit(self.shard.join_as_shard, plan, self.lobby, PATIENCE)
        return self.join_router(plan), joining.result(PATIENCE)

    def close(self) -> None:
        self.router.close()
        self.shard.close()
        self.lobby.close()
        self.pool.shutdown()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(groups, "make_backend", lambda device: DoubleBackend())
    before = threading.active_count()
    pair = Pair()
    yield pair
    pair.close()
    until(lambda: threading.active_count() <= before)


def test_leaving_one_epoch_leaves_the_others(pair: Pair) -> None:
    old, new = pair.form(1), pair.form(2)
    for actor in (pair.router, pair.shard):
        actor.leave(1)
        actor.leave(1)
    assert [joined.group.failure is None for joined in (*old, *new)] == [False, False, True, True]
    new[0].wires["s"].send(3, FrameTag(), [b"x"], time.monotonic() + PATIENCE)
    assert new[1].wires["r"].recv(time.monotonic() + PATIENCE).kind == 3


def test_what_was_given_up_before_it_began_does_not_form(pair: Pair) -> None:
    pair.router.leave(5)
    with pytest.raises(WireTimeout, match="epoch 5"):
        pair.join_router(GroupPlan(5, b"nobody answers", b"", b"", ("r",), ("s",)))
    pair.shard.leave(5)
    with pytest.raises(WireTimeout, match="epoch 5"):
        pair.shard.join_as_shard(GroupPlan(5, b"", b"", b"", ("r",), ("s",)), pair.lobby, PATIENCE)
    pair.form(6)


def test_a_shard_that_waits_for_its_routers_gives_up_when_told(pair: Pair) -> None:
    plan = GroupPlan(1, b"", b"", b"", ("r",), ("s",))
    joining = pair.pool.submit(pair.shard.join_as_shard, plan, pair.lobby, PATIENCE)
    begin = time.monotonic()
    pair.shard.leave(1)
    with pytest.raises(WireTimeout, match="given up"):
        joining.result(PATIENCE)
    assert time.monotonic() - begin < PATIENCE / 2
    pair.form(2)


def test_closing_leaves_everything_for_ever(pair: Pair) -> None:
    joined = pair.form(1)
    pair.router.close()
    assert joined[0].group.failure
    with pytest.raises(WireTimeout):
        pair.join_router(GroupPlan(2, b"nobody answers", b"", b"", ("r",), ("s",)))
