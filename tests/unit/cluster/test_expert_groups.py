"""Who is asked to form a group, and what becomes of those who do not answer."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
from expertmesh.v1.control_pb2 import Role

from actors.transport.base import Address, WireTimeout
from actors.transport.nccl_group import GroupPlan
from cluster import roster
from cluster.config import load_config
from cluster.deployment import Deployment
from cluster.events import EventLog
from cluster.expert_groups import ExpertGroups
from cluster.fleet import ActorHandle, ActorUnreachable
from cluster.local_fleet import LocalFleet
from cluster.roster import Member, Roster
from placement.expert_map import single_replica_map
from tests.waiting import until

FAR = 1e9
ADDRESSES = {name: Address(name, "a") for name in ("s0", "s1")}


class Actor(ActorHandle):
    """Notes what it is asked and answers with ``answers[method]``: a value, an error, or, for None, never."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {"stats": 1, "new_ids": (b"d", b"r", b"a"), "prepare": 1, "join": 1, "leave": 1}

    def begin(self, method: str, *args: Any) -> Future[Any]:
        """See ActorHandle."""
        self.asked.append((method, *args))
        done: Future[Any] = Future()
        answer = self.answers[method]
        if isinstance(answer, BaseException):
            done.set_exception(answer)
        elif answer is not None:
            done.set_result(answer)
        return done

    def plan(self) -> GroupPlan:
        """The plan that it was given last."""
        return next(x for call in reversed(self.asked) for x in call if isinstance(x, GroupPlan))

    def left(self) -> list[int]:
        """Epochs that it was told to leave."""
        return [call[1] for call in self.asked if call[0] == "leave"]


class Town:
    """Two routers and two shards on duty."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(roster, "LIFE_TIMEOUT_S", 0.05)
        self.actors = {name: Actor(name) for name in ("r0", "r1", "s0", "s1")}
        fleet = LocalFleet()
        monkeypatch.setattr(fleet, "spawn", lambda role, name, bundle, *args: self.actors[name])
        monkeypatch.setattr(fleet, "watch", lambda handle: Future())
        monkeypatch.setattr(fleet, "kill", lambda handle: None)
        events = EventLog()
        self.lost: list[str] = []
        self.roster = Roster(fleet, events, lambda member: self.lost.append(member.name))
        roles = {"r": Role.ROLE_ROUTER, "s": Role.ROLE_EXPERT}
        self.members = {n: self.roster.spawn(roles[n[0]], object, n, None) for n in self.actors}
        self.groups = ExpertGroups(Deployment(load_config(None), fleet, self.roster, events))

    def form(self, epoch: int) -> list[Member]:
        m = self.members
        new = single_replica_map(epoch, (1,), 2, ("s0", "s1"))
        return self.groups.form(new, [m["r0"], m["r1"]], [m["s0"], m["s1"]], ADDRESSES, FAR)


@pytest.fixture
def town(monkeypatch: pytest.MonkeyPatch) -> Town:
    return Town(monkeypatch)


def test_everybody_gets_the_same_plan_and_leaves_the_old_group_once_the_new_one_is_in_force(town: Town) -> None:
    assert [router.name for router in town.form(1)] == ["r0", "r1"]
    assert {actor.plan() for actor in town.actors.values()} == {
        GroupPlan(1, b"d", b"r", b"a", ("r0", "r1"), ("s0", "s1"))
    }
    town.groups.settle()
    assert town.groups.routers == {"r0", "r1"}
    town.form(2)
    assert [actor.left() for actor in town.actors.values()] == [[]] * 4
    town.groups.settle()
    assert [actor.left() for actor in town.actors.values()] == [[1]] * 4


def test_a_router_that_does_not_answer_is_lost_and_left_out(town: Town) -> None:
    town.actors["r0"].answers["stats"] = None
    assert [router.name for router in town.form(1)] == ["r1"]
    assert town.lost == ["r0"]
    assert town.actors["s0"].plan().routers == ("r1",)


def test_a_shard_that_does_not_answer_is_lost_before_anybody_waits_for_it(town: Town) -> None:
    town.actors["s1"].answers["stats"] = None
    with pytest.raises(ActorUnreachable, match="s1 does not answer"):
        town.form(1)
    assert town.lost == ["s1"]
    assert "join" not in [call[0] for call in town.actors["s0"].asked]


@pytest.mark.parametrize(
    ("error", "lost"), [(ActorUnreachable("dead"), ["s1"]), (WireTimeout("no wire"), [])], ids=["dead", "failed"]
)
def test_the_first_failure_ends_the_waiting_and_the_others_give_up(
    town: Town, error: Exception, lost: list[str]
) -> None:
    town.form(1)
    town.groups.settle()
    for name, method in (("r0", "prepare"), ("r1", "prepare"), ("s0", "join")):
        town.actors[name].answers[method] = None
    town.actors["s1"].answers["join"] = error
    with pytest.raises(type(error)):
        town.form(2)
    town.groups.undo()
    assert town.lost == lost
    until(lambda: all(town.actors[name].left() == [2] for name in ("r0", "r1", "s0")))
    assert town.groups.routers == {"r0", "r1"}
