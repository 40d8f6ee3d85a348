"""Forming a group: three collective calls that hang until everybody came, under a deadline that they do not know."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from actors.transport.base import WireTimeout
from actors.transport.communicator import Backend, Communicator, CommunicatorError, Transfer
from actors.transport.nccl_group import GroupPlan, NcclGroup

_LOOK_S = 0.02


def nobody_gave_up() -> bool:
    """For those who wait until the deadline."""
    return False


def form_group(
    plan: GroupPlan,
    name: str,
    backend: Backend,
    deadline: float,
    transfer_timeout_s: float = 10.0,
    given_up: Callable[[], bool] = nobody_gave_up,
) -> NcclGroup:
    """Join the group as member ``name``, and exchange a byte with everyone it will ever talk to.

    That byte makes the connections: made on demand they block inside a send, and members that block each other so would
    never come to announce anything. Runs beside a group of an earlier epoch that is in use. It ends early once
    ``given_up()`` is true: somebody is known not to come.

    Errors: ValueError (not a member), WireTimeout (somebody did not come), CommunicatorError.
    """
    forming = _Forming(plan, plan.rank(name), backend)
    outgoing, incoming, rooms = forming.wait(deadline, given_up)
    if name in plan.shards:
        outgoing, incoming = incoming, outgoing
    return NcclGroup(plan, name, backend, outgoing, incoming, rooms, transfer_timeout_s)


class _Forming:
    """A thread that may be stuck in the library for ever, and a caller who will not."""

    def __init__(self, plan: GroupPlan, rank: int, backend: Backend) -> None:
        self._plan, self._rank, self._backend = plan, rank, backend
        self._lock = threading.Lock()
        self._made: list[Communicator] = []
        self._error: Exception | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=f"form-epoch-{plan.epoch}", daemon=True)

    def wait(self, deadline: float, given_up: Callable[[], bool]) -> list[Communicator]:
        """The communicators of dispatch, results and rooms. Errors: see ``form_group``."""
        self._thread.start()
        while self._thread.is_alive() and time.monotonic() < deadline and not given_up():
            self._thread.join(_LOOK_S)
        with self._lock:
            late = self._thread.is_alive()
            failed = late or self._error is not None
            self._abandoned = failed
        if failed:
            self._backend.abort(self._made)
        if self._error is not None:
            raise self._error
        if late:
            why = "was given up" if given_up() else "did not form before the deadline"
            raise WireTimeout(f"the group of epoch {self._plan.epoch} {why}")
        return self._made

    def _run(self) -> None:
        plan, is_router = self._plan, self._rank < len(self._plan.routers)
        try:
            for unique_id in (plan.dispatch_id, plan.results_id, plan.rooms_id):
                self._keep(self._backend.connect(unique_id, self._rank, len(plan.members)))
            for communicator, sends in zip(self._made, (is_router, not is_router, not is_router), strict=True):
                self._greet(communicator, sends)
        except Exception as error:  # handed to the caller, whose thread this is not
            self._error = error

    def _keep(self, communicator: Communicator) -> None:
        with self._lock:
            if not self._abandoned:
                self._made.append(communicator)
                return
        self._backend.abort([communicator])
        raise WireTimeout("everybody came, but after the deadline")

    def _greet(self, communicator: Communicator, sends: bool) -> None:
        routers = range(len(self._plan.routers))
        others = range(len(routers), len(self._plan.members)) if self._rank in routers else routers
        bytes_of = torch.zeros(len(others), dtype=torch.uint8, device=self._backend.device)
        transfers = [Transfer(bytes_of[at : at + 1], peer) for at, peer in enumerate(others)]
        pending = communicator.exchange(transfers, []) if sends else communicator.exchange([], transfers)
        while not pending.done() and not self._abandoned:
            time.sleep(1e-3)
            if (noticed := communicator.failure()) is not None:
                raise CommunicatorError(f"the group of epoch {self._plan.epoch} did not form: {noticed}")
