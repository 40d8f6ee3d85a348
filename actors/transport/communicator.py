"""The narrow view of NCCL that the GPU wire is written against.

What an implementation may do to its callers, and what they therefore must live with:

* ``exchange`` returns once the transfers are *enqueued*. They run later, on the implementation's own stream, after
  everything that the calling thread had enqueued on its current stream.
* Exchanges of one communicator run in the order in which they were posted, one after the other; the transfers inside
  one exchange run side by side.
* A transfer ends only when both sides have posted it with the same number of bytes. Otherwise (the peer died, stopped,
  or announced something else) it *hangs*, without an error, until ``abort``.
* There is no receive from any source, and no receive of an unknown size.
* The first transfer between two ranks may block inside ``exchange`` until the peer has posted its side too, because
  connections are made on demand. ``connect`` blocks until every rank has come.
* After ``abort`` everything pending says ``done`` and its memory holds garbage.

Source: NCCL user guide, "Point-to-point communication", "Group calls", "Fault tolerance".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from actors.transport.base import TransportError


class CommunicatorError(TransportError):
    """The library refused a call. The communicator is unusable then."""


class Transfer(NamedTuple):
    """One side of a transfer: ``tensor`` uint8 [bytes], contiguous, on the backend's device; the other rank."""

    tensor: Tensor
    peer: int


class Pending(Protocol):
    """An exchange that was posted. It keeps its tensors alive."""

    def done(self) -> bool:
        """True once all of it has run, or was aborted. Never waits."""


class Communicator(Protocol):
    """One rank of a communicator. One thread at a time posts; ``failure`` may be asked from any thread."""

    @property
    def rank(self) -> int:
        """This process's rank."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def exchange(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> Pending:
        """Post all of these as one group (an all-to-all-v when every rank does). Errors: CommunicatorError."""

    def failure(self) -> str | None:
        """What the library noticed on its own since the last look (a broken link), else None. Never waits."""


class Backend(Protocol):
    """Where communicators come from."""

    @property
    def device(self) -> torch.device:
        """Where the tensors of transfers must lie."""

    def unique_id(self) -> bytes:
        """A new communicator's name. This process must live until all ranks have connected: it answers them."""

    def connect(self, unique_id: bytes, rank: int, size: int) -> Communicator:
        """Join as ``rank``. Blocks until all ``size`` ranks came, for ever if need be. Errors: CommunicatorError."""

    def abort(self, communicators: Sequence[Communicator]) -> None:
        """End these together, whatever is pending. Local, from any thread, each communicator at most once.

        Together, because ending one may wait for the device, which the other's hanging transfers hold.
        """
