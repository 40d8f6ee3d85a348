"""The contract that every wire of the data plane keeps.

A *wire* joins two processes (or two threads, for ``local``) and carries *frames* both ways. The rules:

* **Order and loss.** Frames of one direction arrive whole, once, and in the order in which they were sent. A
  frame is lost only together with its wire. There is no order between different wires.
* **Pairwise.** A wire knows one peer. A dead, stopped or slow peer breaks its own wire and no other. (``nccl``: its
  own group, see there; other groups and all other wires go on.)
* **Deadlines.** Every call that can wait takes ``deadline``, an absolute ``time.monotonic()`` in seconds, and
  raises :class:`WireTimeout` when it passes. A send that timed out has left the wire torn: it is closed, the peer
  sees PeerGone, and later calls raise :class:`PeerGone`. A receive that timed out has lost nothing and may be called
  again. A deadline in the past takes what is here and does not wait.
* **A peer that stalls** (slow, stopped, or not in a call) is no error by itself: nothing but a deadline tells. What was
  sent to it waits in the medium, and beyond what that holds the sender waits: how much that is differs (a ring, the
  sockets' buffers, 4 MiB, over ``nccl`` one exchange). A peer that comes back before the deadline has lost nothing.
* **A peer that dies.** When the peer closes, or dies (kill -9 included, at any byte of a frame), every waiting and
  every later ``recv`` raises :class:`PeerGone` once the frames that had arrived whole are consumed; part of a frame is
  never handed out; ``send`` raises it at the latest when it would have to wait. EOF of a socket tells it within
  milliseconds.
* **A peer that joins** is a new wire from an endpoint: it is made beside those in use, which notice nothing, and one
  that never gets through its hello is nobody's peer. The same peer connected again is another wire.
* **Both may send first.** ``send`` of any frame up to ``MAX_FRAME_BYTES`` makes progress while the peer is in
  a ``send`` itself: it takes in what arrives meanwhile, so that two sends towards each other never lock. What
  it took in waits for ``recv``; beyond ``MAX_BACKLOG_BYTES`` of such frames it takes in no more and the peer
  has to wait.
* **Buffers.** ``send`` has copied or written the parts when it returns: they are the caller's again. The
  parts of a received :class:`Frame` are views of memory owned by the wire, start at multiples of 64 bytes,
  and are valid until the next ``recv`` on that wire (no other call touches them, so they may be sent on, over
  the same wire too), or until the caller lets go of a frame that it has asked to ``keep``; the wire may be closed
  by then. In the steady state (frames no larger than those before, and no more of them kept at a time) neither
  direction allocates payload memory.
* **Epochs and attempts.** Each frame carries (epoch, step, micro-batch, layer, attempt), which the wire does not
  interpret but for the fence: ``fence(tag)`` makes it drop, and count in ``stats.dropped``, received frames whose
  (epoch, step, attempt) is below that of ``tag``, whether they are here already or come later. Layers and micro-batches
  of a step interleave. Who sends something again raises ``attempt``, so that a late answer is never taken for another.
* **Errors.** WireTimeout: the deadline; try ``recv`` again, or close. PeerGone: this wire is over, whoever ended it;
  close it and connect anew. ProtocolError (of ``recv`` alone): the peer is not to be believed; the wire is closed.
  HandshakeRefused (of ``connect`` alone): the two do not belong together. ValueError and TypeError: the caller's fault;
  nothing was sent and the wire is as before.
* **Threads.** One thread at a time uses a wire; ``close`` alone may come from another thread, at any time,
  any number of times.
* **Waiting** never burns a core: a bounded, adaptive few tens of microseconds of yielding polls, then a
  blocking wait in the kernel.

Sources: design follows the pairwise "M2N" library of MegaScale-Infer (arXiv 2504.02263) in what is promised,
not in how it is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Buffer = bytes | bytearray | memoryview
"""Anything contiguous; memoryviews are sent as their bytes."""

Part: TypeAlias = "memoryview | Tensor"
"""Of a received frame: host memory, or a tensor where the medium carries tensors (``nccl`` alone)."""

MAX_FRAME_BYTES = 256 << 20
"""Largest sum of a frame's parts, in bytes. A larger announcement from a peer is a protocol error."""

MAX_PARTS = 8

MAX_BACKLOG_BYTES = 2 * MAX_FRAME_BYTES
"""A send that waits stops taking in once this many unreceived bytes have piled up, and what is in a ring is taken."""


class Medium(StrEnum):
    """What a wire is made of."""

    LOCAL = "local"
    SHM = "shm"
    TCP = "tcp"
    TLS = "tcp+tls"
    NCCL = "nccl"


class TransportError(Exception):
    """Root of every error of this room."""


class WireTimeout(TransportError):
    """The deadline passed before the call could finish."""


class PeerGone(TransportError):
    """The peer closed the wire, died, or the wire was torn by an earlier error."""


class ProtocolError(TransportError):
    """The peer sent something that is not a frame of ours (wrong magic, version, size)."""


class HandshakeRefused(TransportError):
    """The hello was not answered as it must be: wrong secret, wrong node for shm, a stranger on the port."""


class FrameTag(NamedTuple):
    """Where in the computation a frame belongs. All fields are unsigned 32-bit, ``step`` is 64-bit."""

    epoch: int = 0
    step: int = 0
    micro_batch: int = 0
    layer: int = 0
    attempt: int = 0

    @property
    def fence_key(self) -> tuple[int, int, int]:
        """(epoch, step, attempt) makes a frame stale. Layers and micro-batches of a step interleave."""
        return (self.epoch, self.step, self.attempt)


class Frame(NamedTuple):
    """One received message. ``parts`` are views valid until the next ``recv`` on the same wire; see ``Wire.keep``."""

    kind: int
    tag: FrameTag
    parts: tuple[Part, ...]


@dataclass(slots=True)
class WireStats:
    """Counters since the wire was made; bytes are those of the parts and of one header a frame, over every medium."""

    bytes_sent: int = 0
    bytes_received: int = 0
    frames_sent: int = 0
    frames_received: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Address:
    """How to reach an endpoint. Plain data: it travels through Ray calls.

    ``node_id`` is the Ray node id (or any string that is equal exactly where memory can be shared),
    ``unix_name`` the abstract Unix socket without its leading NUL, ``host:port`` the TCP listener.
    """

    name: str
    node_id: str
    host: str = ""
    port: int = 0
    unix_name: str = ""


class Wire(ABC):
    """One end of a pairwise connection. See the module's text for what is promised."""

    peer: str
    medium: Medium

    @property
    @abstractmethod
    def stats(self) -> WireStats:
        """As of now."""

    @abstractmethod
    def send(self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], deadline: float) -> None:
        """Send one frame of at most MAX_PARTS parts; tensors only over ``nccl``. ``kind`` is below 2^16, there 2^15.

        Errors: WireTimeout, PeerGone, ValueError (a limit), TypeError (a tensor over another medium).
        """

    def ask(
        self, kind: int, tag: FrameTag, parts: Sequence[Buffer | Tensor], answer_bytes: int, deadline: float
    ) -> None:
        """As ``send``, for a frame that the peer answers by exactly one frame of the same tag, before ``deadline``.

        ``answer_bytes``: of the answer's tensors at most; a medium may make room for so much ahead (``nccl``). Tags of
        questions that are open at the same time differ. Fence only the asking end: a question dropped has no answer.
        Errors: as in ``send``; an answer larger than was asked for is a ValueError for the peer.
        """
        self.send(kind, tag, parts, deadline)

    @abstractmethod
    def recv(self, deadline: float) -> Frame:
        """Next frame that is not stale.

        Errors: WireTimeout, PeerGone, ProtocolError (the wire is closed then).
        """

    @abstractmethod
    def keep(self) -> Callable[[], None]:
        """The parts of the frame that ``recv`` returned last stay valid until the result is called: once, by the
        thread that uses the wire. What has been kept already, or was never received, is none of this call's.
        """

    @abstractmethod
    def ready(self) -> bool:
        """True when ``recv`` would not wait: a whole frame is here, or the peer is gone. Never blocks."""

    @abstractmethod
    def buffered(self) -> bool:
        """True when ``recv`` would not wait, judged without a system call.

        A call on the wire may have taken in a frame and emptied its descriptors: look here before waiting on
        those. False says nothing about them.
        """

    @abstractmethod
    def filenos(self) -> tuple[int, ...]:
        """Descriptors that are readable when ``ready`` may have changed; for the :class:`~.poller.Poller`."""

    @abstractmethod
    def fence(self, tag: FrameTag) -> None:
        """From now on drop received frames older than ``tag`` (see ``FrameTag.fence_key``).

        A fence never goes down: one below the current one changes nothing.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything; the peer sees PeerGone. Idempotent, from any thread."""


class EndpointLike(Protocol):
    """Where wires come from: listens under an address and connects to others.

    Incoming wires are handed to the ``on_wire`` callback given at construction, with ``wire.peer`` set to the
    name of the endpoint that connected. A wire belongs to whoever got it; closing the endpoint leaves its
    wires open.
    """

    @property
    def address(self) -> Address:
        """How others reach this endpoint."""

    def connect(self, address: Address, deadline: float, medium: Medium | None = None) -> Wire:
        """A wire to the endpoint at ``address``; ``medium`` None picks the best that both can use.

        Errors: WireTimeout, PeerGone (nobody is there), HandshakeRefused (also: the two cannot use it).
        """

    def close(self) -> None:
        """Stop listening and free everything but the wires. Idempotent."""


EndpointFactory = Callable[[str, Callable[[Wire], None]], EndpointLike]
"""``(name, on_wire) -> endpoint``: how an actor gets its endpoint without knowing where it runs."""
