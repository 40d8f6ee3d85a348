"""From a plan to wires: how a member joins the group of an epoch.

A router connects a fresh companion wire to each shard and says on it which epoch it is for; a shard keeps what it
accepts in a :class:`Lobby` until it is told the plan. Both then form the group, and turn the companions into nccl
wires. Everything happens in the calling thread, beside groups that are in use.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from actors.transport.base import Address, EndpointLike, FrameTag, Medium, PeerGone, Wire, WireTimeout
from actors.transport.communicator import Backend
from actors.transport.nccl import NcclWire
from actors.transport.nccl_form import form_group, nobody_gave_up
from actors.transport.nccl_group import GroupPlan, NcclGroup

_HELLO = 0xFFFE
_LOOK_S = 0.02


class Joined(NamedTuple):
    """A formed group and its wires by peer. Whoever joined closes the wires first, then the group."""

    group: NcclGroup
    wires: dict[str, NcclWire]


class Lobby:
    """Wires that routers have connected for groups to come. Its ``park`` is an endpoint's ``on_wire``."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._fresh: deque[Wire] = deque()
        self._early: dict[tuple[int, str], Wire] = {}
        self._closed = False

    def park(self, wire: Wire) -> None:
        """Keep a wire until its group forms. From any thread; does not wait."""
        with self._changed:
            if self._closed:
                wire.close()
                return
            self._fresh.append(wire)
            self._changed.notify()

    def take(self, plan: GroupPlan, deadline: float, given_up: Callable[[], bool] = nobody_gave_up) -> dict[str, Wire]:
        """The wire of each router of ``plan``. Those of older epochs, which never formed, are closed.

        One thread at a time. Errors: WireTimeout naming who did not connect; nothing is kept then.
        """
        mine: dict[str, Wire] = {}
        for (epoch, peer), wire in list(self._early.items()):
            if epoch <= plan.epoch:
                del self._early[epoch, peer]
                self._sort(plan, mine, epoch, wire)
        while missing := set(plan.routers) - set(mine):
            fresh = self._next(deadline, given_up)
            if fresh is None:
                for wire in mine.values():
                    wire.close()
                why = "when it was given up" if given_up() else "before the deadline"
                raise WireTimeout(f"epoch {plan.epoch}: no wire from {', '.join(sorted(missing))} {why}")
            told = _epoch_of(fresh, deadline)
            if told is not None:
                self._sort(plan, mine, told, fresh)
        return mine

    def close(self) -> None:
        """Close what nobody has taken, and what still comes. Idempotent."""
        with self._changed:
            self._closed = True
            left = [*self._fresh, *self._early.values()]
            self._fresh.clear()
            self._early.clear()
            self._changed.notify()
        for wire in left:
            wire.close()

    def _sort(self, plan: GroupPlan, mine: dict[str, Wire], epoch: int, wire: Wire) -> None:
        if epoch > plan.epoch:
            self._early[epoch, wire.peer] = wire
        elif epoch == plan.epoch and wire.peer in plan.routers and wire.peer not in mine:
            mine[wire.peer] = wire
        else:
            wire.close()

    def _next(self, deadline: float, given_up: Callable[[], bool]) -> Wire | None:
        with self._changed:
            while not self._fresh and not self._closed and not given_up():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, _LOOK_S))
            return self._fresh.popleft() if self._fresh else None


def _epoch_of(wire: Wire, deadline: float) -> int | None:
    """Which epoch the wire was connected for; None when its router has given up, and the wire is closed then."""
    try:
        frame = wire.recv(deadline)
    except (PeerGone, WireTimeout):
        wire.close()
        return None
    if frame.kind != _HELLO:
        wire.close()
        return None
    return frame.tag.epoch


def join_as_router(
    plan: GroupPlan,
    name: str,
    endpoint: EndpointLike,
    shards: Mapping[str, Address],
    backend: Backend,
    deadline: float,
    medium: Medium | None = None,
    transfer_timeout_s: float = 10.0,
    given_up: Callable[[], bool] = nobody_gave_up,
) -> Joined:
    """Connect to every shard of ``plan`` and form the group with them. ``medium`` is that of the companions.

    Errors: TransportError (WireTimeout, PeerGone, HandshakeRefused, CommunicatorError); nothing is left then.
    """
    companions: dict[str, Wire] = {}
    try:
        for shard in plan.shards:
            wire = companions[shard] = endpoint.connect(shards[shard], deadline, medium)
            wire.send(_HELLO, FrameTag(epoch=plan.epoch), [], deadline)
        return _joined(plan, name, backend, companions, deadline, transfer_timeout_s, given_up)
    except BaseException:
        for wire in companions.values():
            wire.close()
        raise


def join_as_shard(
    plan: GroupPlan,
    name: str,
    lobby: Lobby,
    backend: Backend,
    deadline: float,
    transfer_timeout_s: float = 10.0,
    given_up: Callable[[], bool] = nobody_gave_up,
) -> Joined:
    """Wait for every router of ``plan`` and form the group with them. Errors: as in ``join_as_router``."""
    companions = lobby.take(plan, deadline, given_up)
    try:
        return _joined(plan, name, backend, companions, deadline, transfer_timeout_s, given_up)
    except BaseException:
        for wire in companions.values():
            wire.close()
        raise


def _joined(
    plan: GroupPlan,
    name: str,
    backend: Backend,
    companions: Mapping[str, Wire],
    deadline: float,
    transfer_timeout_s: float,
    given_up: Callable[[], bool],
) -> Joined:
    group = form_group(plan, name, backend, deadline, transfer_timeout_s, given_up)
    return Joined(group, {peer: NcclWire(wire, group) for peer, wire in companions.items()})
