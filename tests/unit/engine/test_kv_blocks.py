from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from actors.engine.kv_blocks import BadFree, BlockPool, OutOfBlocks


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


class AllocatorMachine(RuleBasedStateMachine):
    """Against a plain set of the blocks that are out."""

    N_BLOCKS = 9

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockPool(self.N_BLOCKS, 4)
        self.out: set[int] = set()

    @rule(n=st.integers(0, N_BLOCKS + 1))
    def allocate(self, n: int) -> None:
        if n > self.N_BLOCKS - len(self.out):
            with pytest.raises(OutOfBlocks):
                self.allocator.allocate(n)
            return
        taken = self.allocator.allocate(n)
        assert len(set(taken)) == n
        assert self.out.isdisjoint(taken)
        assert all(0 <= block < self.N_BLOCKS for block in taken)
        self.out.update(taken)

    @rule(blocks=st.lists(st.integers(-2, N_BLOCKS + 1), max_size=6))
    def free(self, blocks: list[int]) -> None:
        if len(set(blocks)) == len(blocks) and self.out.issuperset(blocks):
            self.allocator.release(blocks)
            self.out.difference_update(blocks)
        else:
            with pytest.raises(BadFree):
                self.allocator.release(blocks)

    @rule(data=st.data())
    def free_some_that_are_out(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sets(st.sampled_from(sorted(self.out)))) if self.out else set()
        self.allocator.release(blocks)
        self.out -= blocks

    @invariant()
    def balances(self) -> None:
        assert self.allocator.n_free == self.N_BLOCKS - len(self.out)


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
