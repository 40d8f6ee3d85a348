"""Who holds which KV cache block, and what can be found in it. Block ``b`` has ``block_size`` slots, from
``b * block_size`` on.

Blocks are shared by reference counts, and a *published* one, whose content has a key, can still be found after its last
holder let it go, until it is needed for something else: as in vLLM's hash-based prefix caching, whose origin is
PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable


class OutOfBlocks(Exception):
    """More blocks were asked for than are free; none was taken."""


class BadFree(ValueError):
    """A block was given back that nobody holds or that does not exist; nothing of that call was done."""


class NotHeld(ValueError):
    """A block was to be shared that is neither held nor cached, or published that is not held; nothing was done."""


class BlockPool:
    """Counts the holders of blocks ``0 .. n_blocks - 1``; O(1) per block.

    A block is held (by one or more), or free. A free one is plain, or *cached*: published, so that ``find`` still
    knows it. Cached blocks are taken only when no plain one is left, the one that was let go first before others.
    """

    def __init__(self, n_blocks: int, block_size: int) -> None:
        """``block_size`` is in tokens. ValueError unless both are at least 1."""
        if n_blocks < 1:
            raise ValueError(f"n_blocks is {n_blocks}, must be at least 1")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, must be at least 1")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.n_evicted = 0
        self._plain = list(reversed(range(n_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * n_blocks
        self._n_shared = 0
        self._key_of: list[bytes | None] = [None] * n_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def n_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._plain) + len(self._cached)

    @property
    def n_cached(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._cached)

    @property
    def n_shared(self) -> int:
        """Blocks with more than one holder."""
        return self._n_shared

    def needed(self, n_tokens: int) -> int:
        """Blocks that ``n_tokens`` tokens of one sequence fill, the last one perhaps in part."""
        return -(-n_tokens // self.block_size)

    def n_holders(self, block: int) -> int:
        return self._refs[block]

    def writable(self, block: int) -> bool:
        """Whether its holder may change it: nobody else holds it, and nobody can find it."""
        return self._refs[block] == 1 and self._key_of[block] is None

    def allocate(self, n: int) -> list[int]:
        """Take ``n`` blocks for one holder, of unknown content. OutOfBlocks when fewer are free."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} blocks, must be at least 0")
        if n > self.n_free:
            raise OutOfBlocks(f"{n} blocks wanted, {self.n_free} of {self.n_blocks} free")
        taken = [self._plain.pop() if self._plain else self._evict() for _ in range(n)]
        for block in taken:
            self._refs[block] = 1
        return taken

    def share(self, blocks: Collection[int]) -> None:
        """One more holder for each, all or none. NotHeld for one that is neither held nor cached."""
        for block in blocks:
            if not (0 <= block < self.n_blocks and (self._refs[block] or block in self._cached)):
                raise NotHeld(f"block {block} is neither held nor cached")
        for block in blocks:
            self._refs[block] += 1
            self._n_shared += self._refs[block] == 2
            self._cached.pop(block, None)

    def release(self, blocks: Collection[int]) -> None:
        """One holder less for each, all or none; ``blocks`` in the order of their sequence.

        The last of them is evicted first, so that the heads of prompts, which others share, live longest. BadFree
        for one that nobody holds, that is named twice, or does not exist.
        """
        if len(set(blocks)) != len(blocks):
            raise BadFree(f"a block is freed twice in one call: {sorted(blocks)}")
        for block in blocks:
            if not 0 <= block < self.n_blocks:
                raise BadFree(f"block {block} does not exist, ids are 0 to {self.n_blocks - 1}")
            if not self._refs[block]:
                raise BadFree(f"block {block} is free already")
        for block in reversed(tuple(blocks)):
            self._refs[block] -= 1
            self._n_shared -= self._refs[block] == 1
            if self._refs[block] == 0:
                self._let_go(block)

    def publish(self, block: int, key: bytes) -> None:
        """Let a full, held block be found by ``key``; the first block of a key stays the one that is found.

        NotHeld for a block that is not held, ValueError for one that has another key.
        """
        if not (0 <= block < self.n_blocks and self._refs[block]):
            raise NotHeld(f"block {block} is not held")
        if self._key_of[block] not in (None, key):
            raise ValueError(f"block {block} is published under another key")
        if self._block_of.setdefault(key, block) == block:
            self._key_of[block] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first keys, up to the first one that is not published."""
        found = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            found.append(block)
        return found

    def check(self) -> None:
        """Assert what always holds. For tests."""
        plain, cached = set(self._plain), set(self._cached)
        held = {block for block, n in enumerate(self._refs) if n}
        assert len(plain) == len(self._plain)
        assert len(plain) + len(cached) + len(held) == self.n_blocks
        assert plain | cached | held == set(range(self.n_blocks))
        assert self._n_shared == sum(n > 1 for n in self._refs)
        assert {block: key for key, block in self._block_of.items()} == {
            block: key for block, key in enumerate(self._key_of) if key is not None
        }
        assert all(self._key_of[block] is None for block in plain)
        assert all(self._key_of[block] is not None for block in cached)

    def _let_go(self, block: int) -> None:
        if self._key_of[block] is None:
            self._plain.append(block)
        else:
            self._cached[block] = None

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key, self._key_of[block] = self._key_of[block], None
        assert key is not None
        del self._block_of[key]
        self.n_evicted += 1
        return block
