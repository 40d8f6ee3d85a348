"""The header in front of every frame on a byte stream, and the views that follow it.

Little-endian, 64 bytes, always whole: magic ``EXM``, version u8, kind u16, number of parts u16, step u64, epoch u32,
micro-batch u32, layer u32, attempt u32, then MAX_PARTS lengths u32 (unused ones are 0). A fixed size costs 32 bytes and
saves a second read for every frame. The parts follow, each filled up to a multiple of ALIGNMENT: so what lies behind a
header is laid out as a Block is, and needs no copy to be aligned where the stream itself lies in memory.

``src/ring.cpp`` knows this form too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from actors.transport.base import MAX_FRAME_BYTES, MAX_PARTS, Buffer, FrameTag, ProtocolError
from actors.transport.blocks import ALIGNMENT

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL_VERSION = 2
"""Raised whenever the frame header or the handshake changes; two ends must agree on it."""

MAGIC = b"EXM"

_HEADER = struct.Struct(f"<3sBHHQ4I{MAX_PARTS}I")
HEADER_BYTES = _HEADER.size
_PADDING = tuple((0,) * (MAX_PARTS - n) for n in range(MAX_PARTS + 1))
_EMPTY = memoryview(b"")
_FILLING = bytes(ALIGNMENT)


class Header(NamedTuple):
    """A decoded header; ``lengths`` has one entry per part, in bytes."""

    kind: int
    tag: FrameTag
    lengths: tuple[int, ...]


def encode_header(kind: int, tag: FrameTag, lengths: Sequence[int]) -> bytes:
    """HEADER_BYTES bytes announcing parts of these lengths. Errors: ValueError (a limit, a field's range)."""
    count = len(lengths)
    if count > MAX_PARTS:
        raise ValueError(f"a frame has {count} parts; at most {MAX_PARTS} are allowed")
    if sum(lengths) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {sum(lengths)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    epoch, step, micro_batch, layer, attempt = tag
    try:
        return _HEADER.pack(
            MAGIC,
            PROTOCOL_VERSION,
            kind,
            count,
            step,
            epoch,
            micro_batch,
            layer,
            attempt,
            *lengths,
            *_PADDING[count],
        )
    except struct.error as error:
        raise ValueError(f"kind {kind} must fit 16 bits, step 64 and the rest of {tag} 32: {error}") from None


def decode_header(data: Buffer) -> Header:
    """The header in the first HEADER_BYTES of ``data``. Errors: ProtocolError naming the field and what is
    allowed.
    """
    fields = _HEADER.unpack_from(data)
    magic, version, kind, count, step, epoch, micro_batch, layer, attempt = fields[:9]
    if magic != MAGIC:
        raise ProtocolError(f"frame magic is {magic!r}, not {MAGIC!r}")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"frame version is {version}, not {PROTOCOL_VERSION}")
    if count > MAX_PARTS:
        raise ProtocolError(f"a frame announces {count} parts; at most {MAX_PARTS} are allowed")
    lengths = fields[9 : 9 + count]
    if fields[9 + count :] != _PADDING[count]:
        raise ProtocolError(f"a frame of {count} parts announces lengths {fields[9:]}; the unused must be 0")
    if sum(lengths) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame announces {sum(lengths)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return Header(kind, FrameTag(epoch, step, micro_batch, layer, attempt), lengths)


def filling(length: int) -> bytes:
    """What follows a part of so many bytes."""
    return _FILLING[: -length % ALIGNMENT]


def byte_view(part: Buffer | Tensor) -> memoryview:
    """``part`` as a flat view of bytes, without a copy.

    Errors: ValueError when it is not contiguous, TypeError for a tensor: only an nccl wire carries those.
    """
    if not isinstance(part, Buffer):
        raise TypeError(f"a part is a {type(part).__name__}; over this wire parts are bytes, bytearray or memoryview")
    view = memoryview(part)
    if not view.c_contiguous:
        raise ValueError(f"a part of shape {view.shape} and strides {view.strides} is not contiguous")
    if view.ndim == 1 and view.format == "B":
        return view
    return view.cast("B") if view.nbytes else _EMPTY
