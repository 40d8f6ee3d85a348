"""The compiled ring: its frames are those of the general way, and what it does not take it leaves as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.transport.base import FrameTag
from actors.transport.blocks import Block
from actors.transport.frame import HEADER_BYTES, encode_header, filling
from actors.transport.ring import PlainRing, Ring, make_ring

pytestmark = pytest.mark.skipif(make_ring is PlainRing, reason="the ring was not built")

SIZE = 16 << 10
TAG = FrameTag(2**32 - 1, 2**64 - 1, 3, 4, 5)
EMPTY = FrameTag()


def ring(known: int, size: int = SIZE) -> Ring:
    bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    made = make_ring(memoryview(bytearray(size)), *bells, known)
    _BELLS.extend(bells)
    return made


_BELLS: list[int] = []


def close_bells() -> None:
    while _BELLS:
        os.close(_BELLS.pop())


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_bells()


def frame(kind: int, tag: FrameTag, parts: Sequence[bytes]) -> bytes:
    return encode_header(kind, tag, [len(part) for part in parts]) + b"".join(
        part + filling(len(part)) for part in parts
    )


def state(one: Ring) -> tuple[int, int, int]:
    return one.known, one.position, one.unannounced


def with_frames(data: bytes, position: int = 0, known: int | None = None) -> Ring:
    """A reader's ring that has ``data`` at ``position``, ``known`` of it announced before and the rest by the bell."""
    one = ring(0)
    one.position = position
    for at, byte in enumerate(data):
        one.memory[(position + at) % SIZE] = byte
    one.known = len(data) if known is None else known
    if len(data) > one.known:
        os.eventfd_write(one.data_bell, len(data) - one.known)
    return one


@given(
    st.integers(0, 65535),
    st.builds(FrameTag, *[st.integers(0, 2 ** (64 if at == 1 else 32) - 1) for at in range(5)]),
    st.lists(st.binary(max_size=700), max_size=8),
    st.integers(1, 40),
)
def test_it_writes_what_the_general_way_writes(kind: int, tag: FrameTag, parts: list[bytes], before: int) -> None:
    one, want, line = (
        ring(SIZE),
        frame(kind, tag, parts),
        SIZE // 64 - before,
    )  # so that the ring's end is often crossed
    one.position = 64 * line
    assert one.put(kind, tag, parts) == HEADER_BYTES + sum(map(len, parts))
    assert bytes(np.roll(np.frombuffer(one.memory, np.uint8), -64 * line)[: len(want)]) == want
    assert state(one) == (SIZE - len(want), (64 * line + len(want)) % SIZE, 0)
    assert os.eventfd_read(one.data_bell) == len(want)
    close_bells()


def test_room_that_the_bell_tells_of_is_used() -> None:
    one = ring(0)
    os.eventfd_write(one.space_bell, 192)
    assert one.put(1, EMPTY, [b"x" * 65]) == 129
    assert state(one) == (0, 192, 0)


@pytest.mark.parametrize(
    ("kind", "tag", "parts"),
    [
        (1, EMPTY, [b""] * 9),
        (65536, EMPTY, []),
        (-1, EMPTY, []),
        (1, FrameTag(layer=-1), []),
        (1, FrameTag(epoch=2**32), []),
        (1, FrameTag(step=2**64), []),
        (1, FrameTag(attempt=2**32), []),
        (1, EMPTY[:4], []),
        (1, EMPTY, [memoryview(b"abcdef")[::2]]),
        (1, EMPTY, [torch.zeros(3)]),
        (1, EMPTY, [np.zeros(3)]),
        (1, EMPTY, [b"x" * (SIZE - HEADER_BYTES + 1)]),
    ],
)
def test_what_it_may_not_send_is_left_to_the_general_way(kind: int, tag: Any, parts: list[Any]) -> None:
    one = ring(SIZE)
    assert one.put(kind, tag, parts) == 0
    assert state(one) == (SIZE, 0, 0)
    assert bytes(one.memory) == bytes(SIZE)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(one.data_bell)


def test_large_frames_go_in_pieces_which_it_does_not_make() -> None:
    one = ring(1 << 20, 1 << 20)
    assert one.put(1, EMPTY, [bytes((256 << 10) - 63)]) == 0
    assert one.put(1, EMPTY, [bytes((256 << 10) - 64)]) == 256 << 10


@pytest.mark.parametrize("known", [None, 0, 10, HEADER_BYTES])
@pytest.mark.parametrize("line", [0, 10, SIZE // 64 - 1, SIZE // 64 - 2])
def test_it_takes_a_frame_wherever_it_lies(known: int | None, line: int) -> None:
    parts = [b"a" * 65, b"", b"b" * 3]
    data = frame(7, TAG, parts)
    one = with_frames(data, 64 * line, known)
    taken = one.take(Block)
    assert taken is not None
    kind, tag, views, block, size = taken
    assert (kind, tag, [bytes(view) for view in views]) == (7, TAG, parts)
    assert (size, block.size) == (HEADER_BYTES + 68, len(data) - HEADER_BYTES)
    assert state(one) == (0, (64 * line + len(data)) % SIZE, len(data))
    block.view[0] = ord("z")
    assert bytes(views[0][:2]) == b"za"
    assert bytes(views[2]) == bytes(block.view[128:131])
    assert not any(view.readonly for view in views)


def test_large_frames_are_copied_whole_too() -> None:
    data = frame(1, EMPTY, [os.urandom(100_000), os.urandom(5)])
    one = ring(0, 256 << 10)
    one.position, one.known = (256 << 10) - 50_048, len(data)
    one.memory[one.position :] = data[:50_048]
    one.memory[: len(data) - 50_048] = data[50_048:]
    taken = one.take(Block)
    assert taken is not None
    assert bytes(taken[3].view) == data[HEADER_BYTES:]


def test_what_allocates_may_fail_and_then_nothing_was_taken() -> None:
    data = frame(1, EMPTY, [b"abc"])
    one = with_frames(data)
    for allocate, error in ((lambda size: Block(size - 1), TypeError), (lambda size: [][size], IndexError)):
        with pytest.raises(error):
            one.take(allocate)
        assert state(one) == (len(data), 0, 0)


def test_a_closed_ring_neither_takes_nor_puts() -> None:
    one = with_frames(frame(1, EMPTY, []))
    one.close()
    assert one.take(Block) is None
    assert one.put(1, EMPTY, []) == 0


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, b"HTT"), (3, b"\x01"), (6, b"\x09"), (6, b"\x01"), (35, b"\xff")],
)
def test_what_is_not_a_frame_is_left_to_the_general_way(offset: int, value: bytes) -> None:
    data = bytearray(frame(1, EMPTY, [b"a", b"b"]))
    data[offset : offset + len(value)] = value
    one = with_frames(bytes(data))
    assert one.take(Block) is None
    assert state(one) == (len(data), 0, 0)


def test_what_is_not_here_whole_is_left_to_the_general_way() -> None:
    data = frame(1, EMPTY, [b"a" * 65])
    for one in (with_frames(data[:-64]), with_frames(data, 32), with_frames(b"")):
        before = state(one)
        assert one.take(Block) is None
        assert state(one) == before


def test_a_bell_that_claims_more_than_there_is_is_believed_by_nobody() -> None:
    one = with_frames(frame(1, EMPTY, []), known=0)
    os.eventfd_write(one.data_bell, SIZE)
    assert one.take(Block) is None
    assert one.known == SIZE + HEADER_BYTES
    out = ring(0)
    os.eventfd_write(out.space_bell, SIZE + 1)
    assert out.put(1, EMPTY, []) == 0


@pytest.mark.parametrize("memory", [memoryview(b"x" * 64), memoryview(bytearray(65)), memoryview(bytearray(128))[::2]])
def test_memory_that_is_no_ring_is_refused(memory: memoryview) -> None:
    with pytest.raises(ValueError, match="a writable view of bytes is needed"):
        make_ring(memory, 0, 0, 0)
