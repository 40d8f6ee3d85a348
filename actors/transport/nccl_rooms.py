"""Rooms: the low-latency mode of the GPU wire, for answers whose greatest size is known before they exist.

In the exact mode a payload is announced, and its receiver posts the receive then: right for prompts, whose payload
takes longer than all that. A decode step's answers are small and wait for just this: so a router that asks a shard
posts the receive of the answer, of a fixed size, together with its question; the shard's answer goes into that *room*
at once, and what announces it tells only how much of the room is filled.

Rooms have a communicator of their own, from shards to routers. **It cannot lock**: a router has at most one exchange
there, with the receives of all shards that it has asked in one batch. So whatever a shard sends there meets a receive
that is at the head of its router's queue. A batch sent while the rooms are taken is answered in the exact mode.

Only answers have rooms. A shard cannot know when the next rows come, and a receive that waits on an idle device holds
up all that waits for the device as a whole: allocations, and the forming of the next epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.transport.blocks import ALIGNMENT, footprint
from actors.transport.communicator import Communicator, Pending, Transfer
from actors.transport.device_pool import DevicePool

ROOM_BYTES = 4 << 20
"""The largest room. An answer that may be larger comes in the exact mode: its transfer is what takes time."""


@dataclass(eq=False)
class Room:
    """Where an answer will be: ``tensor`` uint8 [size]; ``pending`` from the moment that its receive is posted."""

    tensor: Tensor
    rank: int
    pending: Pending | None = None

    def split(self, sizes: Sequence[int]) -> list[Tensor]:
        """A view for each size, at multiples of 64 bytes."""
        views, offset = [], 0
        for size in sizes:
            views.append(self.tensor[offset : offset + size])
            offset += footprint([size])
        return views


class Rooms:
    """This member's part in the rooms of its group. One thread uses it.

    Tensors come from ``pool`` and go back there: a router's when its wire has handed them out, a shard's by themselves.
    """

    def __init__(self, communicator: Communicator, pool: DevicePool) -> None:
        self._communicator = communicator
        self._pool = pool
        self._reserved: list[Room] = []
        self._under_way: Pending | None = None
        self._filled: deque[tuple[Pending, Tensor]] = deque()

    def reserve(self, size: int, rank: int) -> Room | None:
        """A router's room for the answer of ``rank``, at most ``size`` bytes; None when that has to come exactly.

        ``size`` counts each tensor of the answer rounded up to 64 bytes. The room is posted with ``post``.
        """
        taken = self._under_way is not None and not self._under_way.done()
        if taken or not 0 < size <= ROOM_BYTES or any(room.rank == rank for room in self._reserved):
            return None
        self._reserved.append(Room(self._pool.take(-(-size // ALIGNMENT) * ALIGNMENT), rank))
        return self._reserved[-1]

    def cancel(self, room: Room) -> None:
        """Give up a reserved room: the shard was not asked after all."""
        self._reserved.remove(room)
        self._pool.give(room.tensor)

    def post(self) -> tuple[Pending, list[int]] | None:
        """Post the receives of all that is reserved; with the ranks that will send. Errors: CommunicatorError."""
        if not self._reserved:
            return None
        rooms, self._reserved = self._reserved, []
        pending = self._communicator.exchange([], [Transfer(room.tensor, room.rank) for room in rooms])
        for room in rooms:
            room.pending = pending
        self._under_way = pending
        return pending, [room.rank for room in rooms]

    def fill(self, size: int, tensors: Sequence[Tensor], rank: int) -> Pending:
        """Send a shard's answer into the room of ``size`` bytes that ``rank`` has posted, or will when its batch ends.

        The tensors (contiguous, any dtype, together no larger than the room) are copied. Errors: CommunicatorError.
        """
        while self._filled and self._filled[0][0].done():
            self._pool.give(self._filled.popleft()[1])
        staged = Room(self._pool.take(size), rank)
        for view, tensor in zip(staged.split([tensor.nbytes for tensor in tensors]), tensors, strict=True):
            view.copy_(tensor.view(-1).view(torch.uint8))
        pending = self._communicator.exchange([Transfer(staged.tensor, rank)], [])
        self._filled.append((pending, staged.tensor))
        return pending
