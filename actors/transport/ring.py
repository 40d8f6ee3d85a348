"""One direction of a shared-memory wire, as one end sees it: where it is in the ring, and how much it may handle.

``src/ring.cpp`` has the same with whole frames in and out in one call each; where it was not built, every frame goes
the general way of :class:`~.stream.StreamWire`, piece by piece, which takes longer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.transport.blocks import Block

log = logging.getLogger(__name__)

Taken = tuple[int, tuple[int, int, int, int, int], tuple[memoryview, ...], Block, int]
"""Kind, tag, parts, the block that they lie in, bytes of header and parts."""


class Ring(Protocol):
    """``known`` counts bytes that this end may handle: free ones for the writer, written ones for the reader.
    ``unannounced``: bytes handled of which the peer was not told. ``frames`` and ``bytes`` were moved past the wire
    (see :mod:`actors.express`). ``partial``: the wire has part of a frame, and waits for the rest."""

    known: int
    position: int
    unannounced: int
    partial: bool

    @property
    def frames(self) -> int:
        """See above."""

    @property
    def bytes(self) -> int:
        """See above."""

    @property
    def memory(self) -> memoryview:
        """The ring's bytes, a multiple of 64."""

    @property
    def data_bell(self) -> int:
        """The eventfd that counts bytes written."""

    @property
    def space_bell(self) -> int:
        """The eventfd that counts bytes handled."""

    def put(self, kind: int, tag: tuple[int, ...], parts: Sequence[object]) -> int:
        """Write a whole frame and announce it; returns the bytes of its header and parts. 0: nothing was done, because
        it is large, is not right, or finds no room: the general way is to be gone."""

    def take(self, allocate: Callable[[int], Block]) -> Taken | None:
        """The next frame if it is here whole, copied into ``allocate(size)``; its bytes are unannounced. None: nothing
        was taken, the general way is to be gone."""

    def close(self) -> None:
        """Let go of the memory."""


@dataclass(slots=True)
class PlainRing:
    """A :class:`Ring` that leaves every frame to the general way."""

    memory: memoryview
    data_bell: int
    space_bell: int
    known: int
    position: int = 0
    unannounced: int = 0
    frames: int = 0
    bytes: int = 0
    partial: bool = False

    def put(self, kind: int, tag: tuple[int, ...], parts: Sequence[object]) -> int:
        """See :class:`Ring`."""
        return 0

    def take(self, allocate: Callable[[int], Block]) -> Taken | None:
        """See :class:`Ring`."""
        return None

    def close(self) -> None:
        """See :class:`Ring`."""
        self.memory.release()


def _fastest() -> Callable[[memoryview, int, int, int], Ring]:
    try:
        from actors.transport import _ring
    except ImportError:
        log.warning("the shared-memory ring is not built (no g++ when the package was installed?): frames take longer")
        return PlainRing
    return _ring.Ring


make_ring = _fastest()
"""(memory, data_bell, space_bell, known) -> Ring."""
