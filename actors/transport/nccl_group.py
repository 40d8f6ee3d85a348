"""The members of one epoch of the expert map, joined by NCCL: a communicator each way, and one for rooms.

Routers send over *dispatch* and shards over *results*. With one communicator for both, a router's send of a second
batch and a shard's send of the first one's results would each wait behind the other. The third is that of the
low-latency mode (:mod:`.nccl_rooms`); what follows is about the other two.

**Why nothing locks.** A transfer runs when it is at the head of both sides' queues. Receives are posted only for
payload that was announced, and a member announces the next payload only after its last outgoing exchange has ended. So
every receive that any member has queued belongs to an exchange that is running at its sender, and the transfers of one
exchange run side by side: the head of every queue can always go on. (Two exchanges outstanding would lock: routers that
send to shards A, B and B, A while the shards receive in the other order.) A send that waits for the last exchange takes
in what arrives meanwhile on every wire of the group, as the contract of :mod:`.base` wants.

**The unit of failure** is the group: a dead, stopped or garbling peer leaves transfers that hang, so all communicators
are aborted, all wires of the group raise PeerGone, and the controller forms a group of the next epoch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from actors.transport.base import PeerGone, WireTimeout
from actors.transport.communicator import Backend, Communicator, CommunicatorError, Pending, Transfer
from actors.transport.device_pool import DevicePool
from actors.transport.nccl_rooms import Room, Rooms
from actors.transport.stream import poll_on
from actors.transport.waiting import Waiter
from actors.transport.watchdog import Watchdog

_ABORT_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupPlan:
    """Who is in the group of ``epoch``. Plain data: the controller spreads it.

    The ids come from ``Backend.unique_id`` in one member's process. Ranks are the positions in ``routers`` followed by
    ``shards``; the names are the members' endpoint names.
    """

    epoch: int
    dispatch_id: bytes
    results_id: bytes
    rooms_id: bytes
    routers: tuple[str, ...]
    shards: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.routers or not self.shards:
            raise ValueError(f"a group needs routers and shards; got routers {self.routers}, shards {self.shards}")
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"members of a group must have distinct names; got {', '.join(self.members)}")

    @property
    def members(self) -> tuple[str, ...]:
        """Names by rank."""
        return (*self.routers, *self.shards)

    def rank(self, name: str) -> int:
        """Rank of a member. Errors: ValueError naming who is in the group."""
        if name not in self.members:
            raise ValueError(f"{name!r} is not in the group of epoch {self.epoch}: {', '.join(self.members)}")
        return self.members.index(name)


class Member(Protocol):
    """What a group needs of its wires."""

    def pump(self) -> bool:
        """Take in what is here, also the announcements of payload; True if anything moved. Never waits."""

    def news(self) -> tuple[int, ...]:
        """Descriptors that become readable when ``pump`` may move something; none when it cannot."""

    def ends(self) -> tuple[int, ...]:
        """Descriptors that hang up when the peer is gone: then ``pump`` moves something, also where none is news."""

    def ring(self) -> None:
        """Tell whoever waits on this wire to look again. From any thread."""


class NcclGroup:
    """This process's part in a formed group. Made by :func:`~.nccl_form.form_group`.

    One thread at a time uses a group and all its wires together; ``abort`` and ``close`` may come from any other.
    ``pool`` counts its allocations. ``transfer_timeout_s``: how long announced payload may take to arrive.
    """

    def __init__(
        self,
        plan: GroupPlan,
        name: str,
        backend: Backend,
        outgoing: Communicator,
        incoming: Communicator,
        rooms: Communicator,
        transfer_timeout_s: float,
    ) -> None:
        self.plan = plan
        self.name = name
        self.pool = DevicePool(backend.device)
        self._backend = backend
        self._outgoing, self._incoming = outgoing, incoming
        self._communicators = (outgoing, incoming, rooms)
        self._rooms = Rooms(rooms, self.pool)
        self._transfer_timeout_s = transfer_timeout_s
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._members: list[Member] = []
        self._depth = 0
        self._batch: list[Transfer] = []
        self._batch_deadline = 0.0
        self._under_way: Pending | None = None
        self._staged: list[Tensor] = []
        self._bell: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._waiter = Waiter()
        self._watchdog = Watchdog(f"{name}-epoch-{plan.epoch}", self._noticed, self._end)

    @property
    def failure(self) -> str | None:
        """Why the group is over; None while it works."""
        return self._failure

    @contextmanager
    def batch(self) -> Iterator[None]:
        """All sends inside, over any wires of this group, leave together as one exchange when the block ends.

        What was announced is posted even when the block is left by an error. The end of the block raises nothing of its
        own: that the group is over is told by each of its wires, to whoever polls or uses them.
        """
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._post_batch()

    def abort(self, reason: str) -> None:
        """Give the group up: its wires raise PeerGone from now on. Does not wait. From any thread, any number of times.

        The library is told from the watchdog's thread: its abort may wait for the device.
        """
        with self._lock:
            if self._failure is not None:
                return
            self._failure = reason
        self._watchdog.bite(reason)
        self._ring_all()

    def close(self) -> None:
        """Abort, wait until it is done, and free everything but the wires. Idempotent.

        Quiet groups are aborted too: ``destroy`` waits for peers that may be dead. So call it when no member uses this
        epoch any more, not when this one has stopped to.
        """
        self.abort(f"{self.name} closed its group of epoch {self.plan.epoch}")
        if not self._watchdog.join(_ABORT_S):
            log.error("group of epoch %d: abort did not end within %g s", self.plan.epoch, _ABORT_S)
            return
        with self._lock:
            bell, self._bell = self._bell, None
        if bell is not None:
            os.close(bell)

    # -- for the wires ---------------------------------------------------------------------------------------------

    def join(self, member: Member) -> None:
        """Count this wire in."""
        self._members.append(member)

    def leave(self, member: Member) -> None:
        """Count it out again."""
        self._members.remove(member)

    def require_healthy(self) -> None:
        """PeerGone with the reason when the group is over."""
        if self._failure is not None:
            raise PeerGone(f"the group of epoch {self.plan.epoch} is over: {self._failure}")

    def completed(self, pending: Pending) -> bool:
        """True when it has run and was not aborted."""
        # In this order: an abort, which makes everything pending say done, sets the failure first.
        return pending.done() and self._failure is None

    def begin_send(self, deadline: float, require_open: Callable[[], None]) -> None:
        """Wait until this member may announce payload: until its last exchange has ended (see the module's text).

        ``require_open`` raises PeerGone once the wire that wants to send was closed, so that its closer need not wait.
        Errors: PeerGone; WireTimeout, and then the group is aborted.
        """
        self._batch_deadline = max(deadline, self._batch_deadline) if self._batch else deadline
        late = f"the last exchange of {self.name} had not ended before the deadline"
        while self._under_way is not None and not self.completed(self._under_way):
            if self._failure is not None and time.monotonic() >= deadline:
                raise WireTimeout(late)  # the watchdog found it first, and this wire may know already
            require_open()
            self.require_healthy()
            moved = [member.pump() for member in list(self._members)]
            if any(moved):
                continue
            if not self._await_news(deadline):
                self.abort(late)
                raise WireTimeout(late)
        self.require_healthy()
        if self._under_way is not None:
            self._under_way = None
            for tensor in self._staged:
                self.pool.give(tensor)
            self._staged = []

    def send(self, tensor: Tensor, rank: int) -> None:
        """Add a copy of ``tensor`` (contiguous, any dtype) to the batch; its announcement must be out."""
        payload = tensor.view(-1).view(torch.uint8)
        staged = self.pool.take(payload.numel())
        staged.copy_(payload)
        self._staged.append(staged)
        self._batch.append(Transfer(staged, rank))

    def receive(self, tensors: Sequence[Tensor], rank: int, on_done: Callable[[], None]) -> Pending:
        """Post the receives of announced payload; ``on_done`` is called in another thread. Errors: PeerGone."""
        self.require_healthy()
        try:
            pending = self._incoming.exchange([], [Transfer(tensor, rank) for tensor in tensors])
        except CommunicatorError as error:
            self.abort(str(error))
            raise PeerGone(f"the group of epoch {self.plan.epoch} is over: {error}") from error
        what = f"payload announced by {self.plan.members[rank]}"
        self._watchdog.watch(pending, time.monotonic() + self._transfer_timeout_s, what, on_done)
        return pending

    def reserve(self, size: int, rank: int) -> Room | None:
        """See :meth:`.nccl_rooms.Rooms.reserve`; it is posted when the batch ends, under the batch's deadline."""
        return self._rooms.reserve(size, rank)

    def cancel(self, room: Room) -> None:
        """See :meth:`.nccl_rooms.Rooms.cancel`."""
        self._rooms.cancel(room)

    def fill(self, size: int, tensors: Sequence[Tensor], rank: int, deadline: float) -> None:
        """See :meth:`.nccl_rooms.Rooms.fill`. Never waits. Errors: PeerGone."""
        self.require_healthy()
        try:
            pending = self._rooms.fill(size, tensors, rank)
        except CommunicatorError as error:
            self.abort(str(error))
            raise PeerGone(f"the group of epoch {self.plan.epoch} is over: {error}") from error
        self._watchdog.watch(pending, deadline, f"answering {self.plan.members[rank]}", self._ring)

    def expect(self) -> None:
        """What is pending is about to end: have its end noticed at once."""
        self._watchdog.stir()

    def _post_batch(self) -> None:
        batch, self._batch = self._batch, []
        if self._failure is not None:
            return
        try:
            if batch:
                self._under_way = self._outgoing.exchange(batch, [])
                self._watch(self._under_way, "sending to", [transfer.peer for transfer in batch], self._ring)
            if (posted := self._rooms.post()) is not None:
                self._watch(posted[0], "answers of", posted[1], self._ring_all)
        except CommunicatorError as error:
            self.abort(str(error))

    def _watch(self, pending: Pending, what: str, ranks: Sequence[int], on_done: Callable[[], None]) -> None:
        peers = ", ".join(sorted({self.plan.members[rank] for rank in ranks}))
        self._watchdog.watch(pending, self._batch_deadline, f"{what} {peers}", on_done)

    def _await_news(self, deadline: float) -> bool:
        """False when the deadline passed."""
        bell = self._bell
        if bell is None:
            return True  # closed meanwhile: that is news too
        members = list(self._members)
        news = [fd for member in members for fd in member.news()]
        poll = poll_on([bell, *news], ends=[fd for member in members for fd in member.ends()])
        events = self._waiter.wait(poll, deadline)
        if any(fd == bell for fd, _ in events):
            with self._lock:
                if self._bell is not None:
                    os.eventfd_read(self._bell)
        return bool(events)

    def _ring(self) -> None:
        with self._lock:
            if self._bell is not None:
                os.eventfd_write(self._bell, 1)

    def _ring_all(self) -> None:
        self._ring()
        for member in list(self._members):
            member.ring()

    def _noticed(self) -> str | None:
        return next((noticed for each in self._communicators if (noticed := each.failure()) is not None), None)

    def _end(self, reason: str) -> None:
        """In the watchdog's thread: end all communicators."""
        with self._lock:
            self._failure = self._failure or reason
        self._ring_all()
        log.info("group of epoch %d ends at %s: %s", self.plan.epoch, self.name, self._failure)
        self._backend.abort(self._communicators)
