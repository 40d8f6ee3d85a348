"""Frames as actors without torch know them too: their kinds, and parts in host memory."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from numpy.typing import NDArray

from actors.transport.base import Frame, Part, ProtocolError


class Kind(IntEnum):
    """The ``kind`` of a frame."""

    ROWS = 1
    ROWS_DONE = 2
    DISPATCH = 3
    RESULTS = 4
    FAILED = 5
    TOKENS = 6


def array_bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array, without a copy."""
    return array.data.cast("B")


def on_host(part: Part) -> memoryview:
    """A part that has to be in host memory; ProtocolError for a tensor."""
    if not isinstance(part, memoryview):
        raise ProtocolError(f"a part came as a tensor of {part.nbytes} bytes; it belongs in host memory")
    return part


def expect_parts(frame: Frame, count: int) -> tuple[Part, ...]:
    """The frame's parts; ProtocolError unless there are exactly ``count``."""
    if len(frame.parts) != count:
        raise ProtocolError(f"frame of kind {frame.kind} has {len(frame.parts)} parts, expected {count}")
    return frame.parts
