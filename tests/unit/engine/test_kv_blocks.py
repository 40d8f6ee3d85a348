from __future__ import annotations

from collections import Counter
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.engine.kv_blocks import BadFree, BlockPool, NotHeld, OutOfBlocks


@pytest.mark.parametrize(("n_blocks", "block_size", "named"), [(0, 4, "n_blocks is 0"), (4, 0, "block_size is 0")])
def test_refuses_an_empty_cache(n_blocks: int, block_size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BlockPool(n_blocks, block_size)


@pytest.mark.parametrize(("n_tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_counts_the_blocks_that_tokens_fill(n_tokens: int, blocks: int) -> None:
    assert BlockPool(8, 4).needed(n_tokens) == blocks


def test_gives_out_every_block_once() -> None:
    allocator = BlockPool(5, 4)
    assert sorted(allocator.allocate(2) + allocator.allocate(3)) == [0, 1, 2, 3, 4]
    assert allocator.n_free == 0
    assert allocator.allocate(0) == []


def test_takes_nothing_when_too_few_are_free() -> None:
    allocator = BlockPool(3, 4)
    allocator.allocate(1)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 of 3 free"):
        allocator.allocate(3)
    assert allocator.n_free == 2
    with pytest.raises(ValueError, match="cannot allocate -1"):
        allocator.allocate(-1)


@pytest.mark.parametrize("bad", [[0, 0], [0, 3], [0, 4], [0, -1]])
def test_a_bad_free_frees_nothing(bad: list[int]) -> None:
    allocator = BlockPool(4, 4)
    assert allocator.allocate(3) == [0, 1, 2]
    with pytest.raises(BadFree):
        allocator.release(bad)
    assert allocator.n_free == 1
    allocator.release([0, 1, 2])
    assert allocator.n_free == 4


def key(n: int) -> bytes:
    return bytes([n])


def test_a_published_block_is_found_until_it_is_taken() -> None:
    pool = BlockPool(3, 4)
    first, second = pool.allocate(2)
    pool.publish(first, key(1))
    pool.publish(second, key(2))
    pool.release([first, second])
    assert (pool.n_free, pool.n_cached) == (3, 2)
    assert pool.find([key(1), key(2), key(3)]) == [first, second]
    assert pool.find([key(3), key(1)]) == []
    # The plain block first, then the end of the sequence.
    assert second not in pool.allocate(1)
    assert pool.allocate(1) == [second]
    assert pool.find([key(1), key(2)]) == [first]
    assert pool.n_evicted == 1


def test_who_was_let_go_first_is_taken_first() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(4)
    for block in blocks:
        pool.publish(block, key(block))
    pool.release(blocks[2:])
    pool.release(blocks[:2])
    pool.share([blocks[3]])
    pool.release([blocks[3]])
    assert pool.allocate(4) == [blocks[2], blocks[1], blocks[0], blocks[3]]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2, 4)
    (block,) = pool.allocate(1)
    pool.share([block])
    assert (pool.n_shared, pool.writable(block)) == (1, False)
    pool.release([block])
    assert (pool.n_shared, pool.n_free, pool.writable(block)) == (0, 1, True)
    pool.publish(block, key(1))
    assert not pool.writable(block)
    pool.release([block])
    assert pool.n_free == 2
    with pytest.raises(BadFree):
        pool.release([block])


def test_the_first_block_of_a_key_stays() -> None:
    pool = BlockPool(3, 4)
    first, second = pool.allocate(2)
    pool.publish(first, key(1))
    pool.publish(first, key(1))
    pool.publish(second, key(1))
    assert pool.find([key(1)]) == [first]
    assert pool.writable(second)
    with pytest.raises(ValueError, match="under another key"):
        pool.publish(first, key(2))


@pytest.mark.parametrize("block", [-1, 1, 2])
def test_only_what_is_there_is_shared_and_published(block: int) -> None:
    pool = BlockPool(2, 4)
    pool.allocate(1)
    with pytest.raises(NotHeld, match=f"block {block} "):
        pool.share([0, block])
    assert pool.n_holders(0) == 1
    with pytest.raises(NotHeld, match=f"block {block} "):
        pool.publish(block, key(1))


class PoolMachine(RuleBasedStateMachine):
    """Against lists of holders and of cached blocks, oldest first."""

    N_BLOCKS = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.N_BLOCKS, 4)
        self.tables: list[list[int]] = []
        self.keys: dict[int, bytes] = {}
        self.cached: list[int] = []

    def held(self) -> Counter[int]:
        return Counter(block for table in self.tables for block in table)

    @rule(n=st.integers(0, N_BLOCKS + 1))
    def allocate(self, n: int) -> None:
        n_free = self.N_BLOCKS - len(self.held())
        if n > n_free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(n)
            return
        evicted = self.cached[: max(0, n - (n_free - len(self.cached)))]
        taken = self.pool.allocate(n)
        assert len(set(taken)) == n
        assert not self.held().keys() & set(taken)
        assert set(self.cached) & set(taken) == set(evicted)
        for block in evicted:
            self.cached.remove(block)
            del self.keys[block]
        self.tables.append(taken)

    @rule(names=st.lists(st.integers(0, 9), min_size=1, max_size=4))
    def share(self, names: list[int]) -> None:
        found = self.pool.find(map(key, names))
        block_of = {name: block for block, name in self.keys.items()}
        expected = list(takewhile(lambda block: block is not None, (block_of.get(key(n)) for n in names)))
        assert found == expected
        if len(set(found)) == len(found):
            self.pool.share(found)
            self.cached = [block for block in self.cached if block not in found]
            self.tables.append(found)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), name=st.integers(0, 9))
    def publish(self, data: st.DataObject, name: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.held())))
        if self.keys.get(block, key(name)) != key(name):
            with pytest.raises(ValueError, match="another key"):
                self.pool.publish(block, key(name))
            return
        self.pool.publish(block, key(name))
        if key(name) not in self.keys.values():
            self.keys[block] = key(name)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        held = self.held()
        self.cached += [block for block in reversed(table) if block in self.keys and not held[block]]

    @rule(blocks=st.lists(st.integers(-2, N_BLOCKS + 1), min_size=1, max_size=4))
    def release_wrongly(self, blocks: list[int]) -> None:
        if len(set(blocks)) == len(blocks) and self.held().keys() >= set(blocks):
            return
        with pytest.raises(BadFree):
            self.pool.release(blocks)

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        held = self.held()
        assert self.pool.n_free == self.N_BLOCKS - len(held)
        assert self.pool.n_cached == len(self.cached)
        assert self.pool.n_shared == sum(n > 1 for n in held.values())
        for block in range(self.N_BLOCKS):
            assert self.pool.n_holders(block) == held[block]
            assert self.pool.writable(block) == (held[block] == 1 and block not in self.keys)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
