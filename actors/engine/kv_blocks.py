"""Which KV cache blocks are free. Block ``b`` has ``block_size`` slots, from ``b * block_size`` on."""

from __future__ import annotations

from collections.abc import Collection


class OutOfBlocks(Exception):
    """More blocks were asked for than are free; none was taken."""


class BadFree(ValueError):
    """A block was given back that is not in use or does not exist; none of that call's blocks was freed."""


class BlockPool:
    """Hands out block ids ``0 .. n_blocks - 1``, each to one owner at a time; O(1) per block."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        """``block_size`` is in tokens. ValueError unless both are at least 1."""
        if n_blocks < 1:
            raise ValueError(f"n_blocks is {n_blocks}, must be at least 1")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, must be at least 1")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(reversed(range(n_blocks)))
        self._used = bytearray(n_blocks)

    @property
    def n_free(self) -> int:
        return len(self._free)

    def needed(self, n_tokens: int) -> int:
        """Blocks that ``n_tokens`` tokens of one sequence fill, the last one perhaps in part."""
        return -(-n_tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """Take ``n`` blocks, the most recently freed first. OutOfBlocks when fewer are free."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks, must be at least 0")
        if n > len(self._free):
            raise OutOfBlocks(f"{n} blocks wanted, {len(self._free)} of {self.n_blocks} free")
        taken = [self._free.pop() for _ in range(n)]
        for block in taken:
            self._used[block] = 1
        return taken

    def free(self, blocks: Collection[int]) -> None:
        """Give blocks back, all or none. BadFree for one that is free already, named twice, or no block."""
        if len(set(blocks)) != len(blocks):
            raise BadFree(f"a block is freed twice in one call: {sorted(blocks)}")
        for block in blocks:
            if not 0 <= block < self.n_blocks:
                raise BadFree(f"block {block} does not exist, ids are 0 to {self.n_blocks - 1}")
            if not self._used[block]:
                raise BadFree(f"block {block} is free already")
        for block in blocks:
            self._used[block] = 0
        self._free.extend(blocks)
