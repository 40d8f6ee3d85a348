"""An actor's part in the NCCL groups of the expert map's epochs: it joins one, and leaves it when its epoch is over.

A group forms in the thread of the control call that asks for it, beside the one in use.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping

import torch

from actors.transport.base import Address, EndpointLike, Medium, WireTimeout
from actors.transport.communicator import Backend
from actors.transport.cupy_nccl import CupyBackend
from actors.transport.nccl_group import GroupPlan
from actors.transport.nccl_join import Joined, Lobby, join_as_router, join_as_shard


def make_backend(device: torch.device) -> Backend:
    """Where this process's communicators come from. Raises ValueError with what is missing."""
    return CupyBackend(device)


class Groups:
    """The groups that the actor ``name`` is in, by epoch. Any thread; one joins at a time."""

    def __init__(self, name: str, device: torch.device, transfer_timeout_s: float) -> None:
        self._name = name
        self._device = device
        self._timeout_s = transfer_timeout_s
        self._backend: Backend | None = None
        self._joined: dict[int, Joined] = {}
        self._given_up = 0.0  # groups of this epoch and older ones shall not form
        self._joining = threading.Lock()
        self._changing = threading.Lock()

    def new_ids(self) -> tuple[bytes, bytes, bytes]:
        """Names for the three communicators of a group. This process must live until everybody has joined."""
        backend = self._get_backend()
        return backend.unique_id(), backend.unique_id(), backend.unique_id()

    def join_as_router(
        self,
        plan: GroupPlan,
        endpoint: EndpointLike,
        shards: Mapping[str, Address],
        medium: Medium | None,
        timeout_s: float,
    ) -> Joined:
        """See :func:`~.transport.nccl_join.join_as_router`; it ends early when ``leave`` is called meanwhile."""
        deadline = time.monotonic() + timeout_s
        return self._join(
            plan,
            lambda backend, given_up: join_as_router(
                plan, self._name, endpoint, shards, backend, deadline, medium, self._timeout_s, given_up
            ),
        )

    def join_as_shard(self, plan: GroupPlan, lobby: Lobby, timeout_s: float) -> Joined:
        """See :func:`~.transport.nccl_join.join_as_shard`; it ends early when ``leave`` is called meanwhile."""
        deadline = time.monotonic() + timeout_s
        return self._join(
            plan,
            lambda backend, given_up: join_as_shard(
                plan, self._name, lobby, backend, deadline, self._timeout_s, given_up
            ),
        )

    def leave(self, epoch: int) -> None:
        """Nobody works by the group of ``epoch`` any more, or it shall not form: free it. Idempotent."""
        with self._changing:
            self._given_up = max(self._given_up, epoch)
            joined = self._joined.pop(epoch, None)
        if joined is not None:
            _end(joined)

    def close(self) -> None:
        """Leave every group, for ever. For the end, when the wires are closed. Idempotent."""
        with self._changing:
            self._given_up = math.inf
            left, self._joined = self._joined, {}
        for joined in left.values():
            _end(joined)

    def _join(self, plan: GroupPlan, join: Callable[[Backend, Callable[[], bool]], Joined]) -> Joined:
        def given_up() -> bool:
            return plan.epoch <= self._given_up

        late = WireTimeout(f"{self._name}: the group of epoch {plan.epoch} was given up")
        with self._joining:
            if given_up():
                raise late
            joined = join(self._get_backend(), given_up)
            with self._changing:
                if not given_up():
                    self._joined[plan.epoch] = joined
                    return joined
        _end(joined)
        raise late

    def _get_backend(self) -> Backend:
        with self._changing:
            if self._backend is None:
                self._backend = make_backend(self._device)
            return self._backend


def _end(joined: Joined) -> None:
    # The group first: a send that waits inside it holds its wire. No farewell is due, everybody leaves this epoch.
    joined.group.close()
    for wire in joined.wires.values():
        wire.close()
