"""Memory for received payload, reused so that the steady state allocates none."""

from __future__ import annotations

import ctypes
from bisect import insort_left
from collections.abc import Sequence

ALIGNMENT = 64
"""Every received part starts at a multiple of this many bytes (a cache line; enough for any dtype and SIMD
load).
"""

_KEEP_BYTES = 64 << 20
_KEEP_BLOCKS = 32
_PAGE = 4096


class Block:
    """Writable aligned memory for one frame's parts."""

    __slots__ = ("size", "view")

    def __init__(self, size: int) -> None:
        raw = bytearray(size + ALIGNMENT)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(raw)) % ALIGNMENT
        self.size = size
        self.view = memoryview(raw)[start : start + size]

    def split(self, lengths: Sequence[int]) -> tuple[memoryview, ...]:
        """One view per length, each at an aligned offset; together they need ``footprint(lengths)`` bytes."""
        views, offset = [], 0
        for length in lengths:
            views.append(self.view[offset : offset + length])
            offset += -(-length // ALIGNMENT) * ALIGNMENT
        return tuple(views)


def footprint(lengths: Sequence[int]) -> int:
    """Bytes that ``Block.split(lengths)`` needs."""
    return sum([-(-length // ALIGNMENT) for length in lengths]) * ALIGNMENT  # a list: half a generator's time


class BlockPool:
    """Free blocks of one wire, smallest first. Not thread-safe: its wire's owner is its only user.

    Keeps at most 32 blocks and 64 MiB, but always the two largest, so that frames no larger than earlier ones
    are served without allocation however large they are (one block is with the caller while the next fills).
    """

    def __init__(self) -> None:
        self._free: list[Block] = []
        self._free_bytes = 0
        self.allocations = 0

    def take(self, size: int) -> Block:
        """A block of at least ``size`` bytes: the smallest free one that fits, else a new one."""
        for index, block in enumerate(self._free):
            if block.size >= size:
                self._free_bytes -= block.size
                return self._free.pop(index)
        self.allocations += 1
        # One eighth of slack lets frames that creep upwards reuse a block instead of making one each.
        return Block(-(-(size + size // 8) // _PAGE) * _PAGE or _PAGE)

    def give(self, block: Block) -> None:
        """Hand a block back; its views may be overwritten from now on."""
        insort_left(self._free, block, key=_size)  # before its equals: what was used last is still in the cache
        self._free_bytes += block.size
        while len(self._free) > 2 and (self._free_bytes > _KEEP_BYTES or len(self._free) > _KEEP_BLOCKS):
            self._free_bytes -= self._free.pop(0).size


def _size(block: Block) -> int:
    return block.size
