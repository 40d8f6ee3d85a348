"""Payload memory is reused, aligned and bounded."""

from __future__ import annotations

import ctypes
import random

from actors.transport.blocks import ALIGNMENT, Block, BlockPool, footprint


def test_parts_are_aligned_and_apart() -> None:
    sizes = (1, 0, 64, 65, 1000)
    parts = Block(footprint(sizes)).split(sizes)
    assert tuple(map(len, parts)) == sizes
    starts = [ctypes.addressof(ctypes.c_char.from_buffer(part)) for part in parts if part]
    assert all(start % ALIGNMENT == 0 for start in starts)
    for index, part in enumerate(parts):
        part[:] = bytes([index]) * len(part)
    assert all(bytes(part) == bytes([index]) * len(part) for index, part in enumerate(parts))


def test_of_equal_blocks_the_one_used_last_is_the_next() -> None:
    """It is still in the cache."""
    pool = BlockPool()
    blocks = [pool.take(100) for _ in range(3)]
    for block in blocks:
        pool.give(block)
    assert [pool.take(100) for _ in range(3)] == blocks[::-1]


def test_sizes_seen_before_allocate_nothing() -> None:
    pool, rng = BlockPool(), random.Random(3)
    for _ in range(3):
        pool.give(pool.take(90 << 20))
    held = [pool.take(90 << 20), pool.take(90 << 20)]
    for block in held:
        pool.give(block)
    before = pool.allocations
    for _ in range(200):
        held = [pool.take(rng.randint(0, 90 << 20)), pool.take(rng.randint(0, 90 << 20))]
        for block in held:
            pool.give(block)
    assert pool.allocations == before == 2


def test_the_smallest_fitting_block_is_taken() -> None:
    pool = BlockPool()
    blocks = [pool.take(size) for size in (1 << 20, 1 << 12, 1 << 16)]
    for block in blocks:
        pool.give(block)
    assert pool.take(1 << 15) is blocks[2]
    assert pool.take(1 << 17) is blocks[0]


def test_what_a_burst_needed_is_given_back() -> None:
    pool = BlockPool()
    burst = [pool.take(8 << 20) for _ in range(40)]
    for block in burst:
        pool.give(block)
    assert pool._free_bytes <= 64 << 20
    assert pool._free_bytes == sum(block.size for block in pool._free)
    many = [pool.take(10) for _ in range(200)]
    for block in many:
        pool.give(block)
    assert len(pool._free) <= 32
