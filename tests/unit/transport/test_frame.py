"""The frame header: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.transport.base import MAX_FRAME_BYTES, MAX_PARTS, FrameTag, ProtocolError
from actors.transport.frame import HEADER_BYTES, byte_view, decode_header, encode_header

u32 = st.integers(0, 2**32 - 1)
tags = st.builds(FrameTag, u32, st.integers(0, 2**64 - 1), u32, u32, u32)
lengths = st.lists(st.integers(0, MAX_FRAME_BYTES // MAX_PARTS), max_size=MAX_PARTS)


@given(st.integers(0, 65535), tags, lengths)
def test_a_header_comes_back(kind: int, tag: FrameTag, sizes: list[int]) -> None:
    data = encode_header(kind, tag, sizes)
    assert len(data) == HEADER_BYTES
    assert decode_header(memoryview(data)) == (kind, tag, tuple(sizes))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_header(data)


@pytest.mark.parametrize(
    ("offset", "value", "text"),
    [
        (0, b"HTT", "magic is b'HTT'"),
        (3, b"\x01", "version is 1, not 2"),
        (6, struct.pack("<H", MAX_PARTS + 1), "9 parts; at most 8"),
        (6, struct.pack("<H", 1), "1 parts announces lengths"),
        (32, struct.pack("<I", MAX_FRAME_BYTES), "announces 268435459 bytes; at most 268435456"),
    ],
)
def test_each_field_is_checked(offset: int, value: bytes, text: str) -> None:
    data = bytearray(encode_header(1, FrameTag(), [0, 3]))
    data[offset : offset + len(value)] = value
    with pytest.raises(ProtocolError, match=text):
        decode_header(data)


def test_the_largest_frame_is_allowed_and_one_byte_more_is_not() -> None:
    encode_header(1, FrameTag(), [MAX_FRAME_BYTES])
    with pytest.raises(ValueError, match="268435457"):
        encode_header(1, FrameTag(), [MAX_FRAME_BYTES, 1])


def test_views_do_not_copy() -> None:
    data = bytearray(8)
    view = byte_view(memoryview(data).cast("I"))
    data[5] = 9
    assert (view.format, view[5]) == ("B", 9)


def test_a_tensor_is_refused_where_wires_carry_bytes() -> None:
    with pytest.raises(TypeError, match="a part is a Tensor; over this wire parts are bytes, bytearray or memoryview"):
        byte_view(torch.zeros(3, dtype=torch.uint8))
