"""The sequences in the engine, by arrival, and the KV blocks they hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise

from actors.engine.kv_blocks import BlockPool
from actors.engine.sequence import Sequence, Status


class Lineup:
    """Running sequences, which hold blocks, and waiting ones, which hold none.

    Both are in order of arrival, and every running sequence arrived before every waiting one: sequences start
    from the front of the queue, and only the youngest running one is ever sent back to it.
    """

    def __init__(self, blocks: BlockPool) -> None:
        self.blocks = blocks
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.n_preempted = 0
        self._sent_back: list[str] = []
        self._by_id: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def join(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self._by_id[sequence.request.request_id] = sequence
        self.waiting.append(sequence)

    def has_room_for(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence may start: room for all its tokens, and a block for each running one.

        Those will soon ask for that block, and would preempt the newcomer.
        """
        return self.blocks.needed(len(sequence.token_ids)) + len(self.running) <= self.blocks.n_free

    def start(self) -> Sequence:
        """Let the first in the queue run."""
        sequence = self.waiting.popleft()
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return sequence

    def grow(self, sequence: Sequence, n_tokens: int) -> int:
        """Take blocks for ``n_tokens`` more tokens, if need be from the youngest; returns how many have room.

        All have, unless ``sequence`` is itself the youngest: then it gets what is free, perhaps nothing.
        """
        need = self.blocks.needed(sequence.n_computed + n_tokens) - len(sequence.block_table)
        while need > self.blocks.n_free and self.running[-1] is not sequence:
            self._preempt_youngest()
        if need > 0:
            sequence.block_table += tuple(self.blocks.allocate(min(need, self.blocks.n_free)))
        return min(n_tokens, len(sequence.block_table) * self.blocks.block_size - sequence.n_computed)

    def take_preempted(self) -> tuple[str, ...]:
        """The ids of those that were sent back to the queue since the last call."""
        sent_back, self._sent_back = self._sent_back, []
        return tuple(sent_back)

    def remove(self, sequence: Sequence) -> None:
        """Take an ended sequence out and free its blocks."""
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        sequence.status = Status.ENDED
        self._release(sequence)
        del self._by_id[sequence.request.request_id]

    def check(self) -> None:
        """Assert what always holds. For tests."""
        queue = [*self.running, *self.waiting]
        assert all(older.arrival < younger.arrival for older, younger in pairwise(queue))
        assert {sequence.request.request_id: sequence for sequence in queue} == self._by_id
        owned = [block for sequence in queue for block in sequence.block_table]
        assert len(set(owned)) == len(owned) == self.blocks.n_blocks - self.blocks.n_free
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.block_table
            assert sequence.n_computed == 0
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert sequence.n_uncomputed >= 1
            assert sequence.n_computed <= len(sequence.block_table) * self.blocks.block_size

    def _preempt_youngest(self) -> None:
        """Its tokens are kept, their KV is not."""
        sequence = self.running.pop()
        sequence.status = Status.WAITING
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.n_preempted += 1
        self._sent_back.append(sequence.request.request_id)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table = ()
        sequence.n_computed = 0
