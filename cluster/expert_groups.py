"""ExpertGroups: with ``transport: nccl``, the group of routers and expert shards that belongs to each expert map.

A group's members never change: every new map, and every router that comes or goes, means a new group. It forms beside
the one in use, in the background; nothing switches before it has formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any

from actors.transport.base import Address
from cluster.calls import log_failure
from cluster.deployment import Deployment, left
from cluster.fleet import ActorUnreachable
from cluster.roster import Member, Roster
from placement.expert_map import ExpertMap


@dataclass(frozen=True)
class _Formed:
    epoch: int
    routers: tuple[Member, ...]
    shards: tuple[Member, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        return (*self.routers, *self.shards)


class ExpertGroups:
    """One per cluster. ``form`` before routers commit a map; then ``settle``, or ``undo`` if they shall not."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._in_force: _Formed | None = None
        self._next: _Formed | None = None

    @property
    def any(self) -> bool:
        """True once some map is in force."""
        return self._in_force is not None

    @property
    def routers(self) -> set[str]:
        """Names of the routers in the group in force."""
        return {router.name for router in self._in_force.routers} if self._in_force else set()

    def form(
        self,
        new: ExpertMap,
        routers: Sequence[Member],
        shards: Sequence[Member],
        addresses: Mapping[str, Address],
        deadline: float,
    ) -> list[Member]:
        """Let everybody form the group of ``new``; routers have it prepared then. Returns the routers.

        Who does not answer is lost first: forming with the dead would only end at the deadline. Routers are left out
        then. Errors: ActorUnreachable (a shard of the map; no router at all), TransportError, TimeoutError.
        """
        alive = self._roster.answering((*routers, *shards))
        members = [router for router in routers if router in alive]
        dead = sorted(shard.name for shard in shards if shard not in alive)
        if dead or not members:
            raise ActorUnreachable(f"{', '.join(dead) or 'every router'} does not answer")
        dispatch_id, results_id, rooms_id = members[0].handle.call("new_ids", timeout_s=left(deadline))
        names = tuple(router.name for router in members)
        from actors.transport.nccl_group import GroupPlan  # loads torch, which only this rule of wires needs here

        plan = GroupPlan(new.epoch, dispatch_id, results_id, rooms_id, names, tuple(shard.name for shard in shards))
        self._next = _Formed(new.epoch, tuple(members), tuple(shards))
        arguments = (new, addresses, self._deployment.wires.medium, left(deadline), plan)
        calls = {member: member.handle.begin("prepare", *arguments) for member in members}
        calls |= {shard: shard.handle.begin("join", plan, left(deadline)) for shard in shards}
        self._await(calls, deadline)
        return members

    def settle(self) -> None:
        """The map of the last group formed is in force everywhere: the group before it is over."""
        old, self._in_force, self._next = self._in_force, self._next, None
        if old is not None:
            self._end(old)

    def undo(self) -> None:
        """The last group shall not be used: members that still form it give up."""
        given_up, self._next = self._next, None
        if given_up is not None:
            self._end(given_up)

    def _await(self, calls: Mapping[Member, Future[Any]], deadline: float) -> None:
        """Wait for all, or for the first that fails: the others would wait for that one for ever."""
        done, forming = wait(calls.values(), left(deadline), FIRST_EXCEPTION)
        for member, call in calls.items():
            if call in done and isinstance(call.exception(), ActorUnreachable):
                self._roster.lose(member, "it died while a group was formed with it")
        for call in done:
            call.result()
        if forming:
            raise TimeoutError

    def _end(self, group: _Formed) -> None:
        for member in group.members:
            if self._roster.find(member.name) is member:
                member.handle.begin("leave", group.epoch).add_done_callback(log_failure)

    @property
    def _roster(self) -> Roster:
        return self._deployment.roster
