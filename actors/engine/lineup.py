"""The sequences in the engine and the KV blocks they hold."""

from __future__ import annotations

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import count, pairwise
from operator import attrgetter

from actors.engine.fair_queue import FairQueue
from actors.engine.kv_blocks import BlockPool
from actors.engine.request import Priority
from actors.engine.reuse import Found, Reuse
from actors.engine.sequence import Sequence, Status

_BY_RANK = attrgetter("rank")


class Lineup:
    """Running sequences, by rank, which hold blocks, and waiting ones, which hold none.

    Who needs a block takes it from the running sequence of the highest rank, which goes back to the queue; who would
    have to take it from itself waits. So the first of the running ones always moves forward.
    """

    def __init__(self, blocks: BlockPool, max_running: int, prefix_cache: bool) -> None:
        self.blocks = blocks
        self.reuse = Reuse(blocks, prefix_cache)
        self.running: list[Sequence] = []
        self.waiting = FairQueue()
        self.n_preempted = 0
        self._n_started = 0
        self._max_running = max_running
        self._sent_back: list[str] = []
        self._copies: list[tuple[int, int]] = []
        self._by_id: dict[str, Sequence] = {}
        self._arrivals = count()
        self._patient: OrderedDict[str, Sequence] = OrderedDict()  # those in class BATCH, by arrival
        self._favoured: Sequence | None = None  # the batch sequence that counts as interactive

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def join(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue."""
        request = sequence.request
        leader = self._by_id.get(request.leader)
        if leader is not None and _same_prompt(sequence, leader):
            sequence.siblings = leader.siblings
            sequence.siblings.append(sequence)
        sequence.arrival = next(self._arrivals)
        self._by_id[request.request_id] = sequence
        if sequence.priority is Priority.BATCH:
            self._patient[request.request_id] = sequence
        self.waiting.enter(sequence)
        self.waiting.push(sequence)

    def end_patience(self, now: float) -> None:
        """The batch sequence that came first counts as interactive once its patience is over, up to its end.

        There is one at a time, and it comes into that class as one that arrives now, behind those that are there: a
        backlog of them always moves on, and takes no more from interactive requests than one such stream does.
        """
        if self._favoured is not None or not self._patient:
            return
        request_id, sequence = next(iter(self._patient.items()))
        if sequence.patient_until <= now:
            del self._patient[request_id]
            self._favoured = sequence
            self._promote(sequence)

    def start(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run, if need be in the place of running ones of a lower class; False: no room.

        Room is a place, blocks for all its tokens, and one more for each running sequence: those will soon ask for
        it, and would preempt the newcomer.
        """
        while (found := self._room(sequence)) is None:
            if not self._would_have_room(sequence):
                return False
            self._preempt(self.running[-1])
        self._run(sequence, found)
        return True

    def grow(self, sequence: Sequence, n_tokens: int) -> int:
        """Take blocks for ``n_tokens`` more tokens, if need be from those behind; returns how many have room.

        All have, unless ``sequence`` is itself the last: then it gets what is free, perhaps nothing. A block that is
        written next and that others see is copied first.
        """
        table, size = sequence.block_table, self.blocks.block_size
        at = sequence.n_computed // size
        shared = at < len(table) and not self.blocks.writable(table[at])
        need = self.blocks.needed(sequence.n_computed + n_tokens) - len(table) + shared
        while need > self.blocks.n_free and self.running[-1] is not sequence:
            self._preempt(self.running[-1])
        if shared:
            if not self.blocks.n_free:
                return 0
            self._copy(sequence, at)
            need -= 1
        if need > 0:
            sequence.block_table += tuple(self.blocks.allocate(min(need, self.blocks.n_free)))
        return min(n_tokens, len(sequence.block_table) * size - sequence.n_computed)

    def take_started(self) -> int:
        """How many began to run since the last call."""
        n_started, self._n_started = self._n_started, 0
        return n_started

    def take_preempted(self) -> tuple[str, ...]:
        """The ids of those that were sent back to the queue since the last call."""
        sent_back, self._sent_back = self._sent_back, []
        return tuple(sent_back)

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """The (from, to) blocks that are to be copied, in order, since the last call."""
        copies, self._copies = self._copies, []
        return tuple(copies)

    def remove(self, sequence: Sequence) -> None:
        """Take an ended sequence out and let go of its blocks. A sibling that needs them has its place at once."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            if (heir := self.reuse.heir(sequence)) is not None:
                self._run(heir, self._inherited(heir))
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.ENDED
        sequence.siblings.remove(sequence)
        self.waiting.leave(sequence)
        self._patient.pop(sequence.request.request_id, None)
        if self._favoured is sequence:
            self._favoured = None
        del self._by_id[sequence.request.request_id]

    def check(self) -> None:
        """Assert what always holds. For tests."""
        self.blocks.check()
        self.reuse.check(self.running)
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting)
        assert all(first.rank < second.rank for first, second in pairwise(self.running))
        assert {s.request.request_id: s for s in (*self.running, *waiting)} == self._by_id
        assert len(self.running) <= self._max_running
        assert all(s in s.siblings and s.siblings == [t for t in self if t.siblings is s.siblings] for s in self)
        assert all(s.priority is s.request.priority for s in self if s is not self._favoured)
        held = Counter(block for sequence in self.running for block in sequence.block_table)
        assert all(self.blocks.n_holders(block) == held[block] for block in range(self.blocks.n_blocks))
        for sequence in waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.block_table
            assert sequence.n_computed == sequence.n_verified == 0
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert sequence.n_uncomputed >= 1
            assert sequence.n_verified <= sequence.n_computed <= len(sequence.block_table) * self.blocks.block_size

    def _run(self, sequence: Sequence, found: Found) -> None:
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_BY_RANK)
        self.reuse.begin(sequence, found)
        self._n_started += 1

    def _inherited(self, heir: Sequence) -> Found:
        """What it finds, in so few blocks that there would be one for a copy of the last if it was alone."""
        found = self.reuse.find(heir)
        return found if len(found.blocks) < self.blocks.n_blocks else self.reuse.only_whole(found)

    def _room(self, sequence: Sequence) -> Found | None:
        """What the sequence can start with, if there is room for it now."""
        if len(self.running) >= self._max_running:
            return None
        found = self.reuse.find(sequence)
        for usable in (found, self.reuse.only_whole(found)):
            if self._need(sequence, usable) + len(self.running) <= self.blocks.n_free:
                return usable
        return None

    def _would_have_room(self, sequence: Sequence) -> bool:
        """Whether room would come of preempting those of a lower class, so that none is preempted in vain.

        A block comes free if all who hold it are among them, but for one that the sequence takes over itself.
        """
        lower = [s for s in self.running if s.priority > sequence.priority]
        if not lower:
            return False
        found = self.reuse.only_whole(self.reuse.find(sequence))
        held = Counter(block for s in lower for block in s.block_table)
        freed = {block for block, n in held.items() if n == self.blocks.n_holders(block)}.difference(found.blocks)
        return self._need(sequence, found) + len(self.running) - len(lower) <= self.blocks.n_free + len(freed)

    def _need(self, sequence: Sequence, found: Found) -> int:
        """Free blocks that a start with ``found`` takes: new ones, a copy, and those that were only cached."""
        blocks = self.blocks
        copied = found.n_tokens % blocks.block_size > 0
        cached = sum(blocks.n_holders(block) == 0 for block in found.blocks)
        return blocks.needed(len(sequence.token_ids)) - len(found.blocks) + copied + cached

    def _copy(self, sequence: Sequence, at: int) -> None:
        """Give the sequence a block of its own for number ``at`` of its table."""
        table = sequence.block_table
        (own,) = self.blocks.allocate(1)
        self._copies.append((table[at], own))
        self.blocks.release((table[at],))
        sequence.block_table = (*table[:at], own, *table[at + 1 :])

    def _promote(self, sequence: Sequence) -> None:
        running = sequence.status is Status.RUNNING
        if running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.waiting.leave(sequence)
        sequence.priority = Priority.INTERACTIVE
        sequence.arrival = next(self._arrivals)
        sequence.was_preempted = False
        self.waiting.enter(sequence)
        if running:
            insort(self.running, sequence, key=_BY_RANK)
        else:
            self.waiting.push(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Send it back to the queue: its tokens are kept, its KV only as far as it is cached."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.was_preempted = True
        self.waiting.push(sequence)
        self.n_preempted += 1
        self._sent_back.append(sequence.request.request_id)

    def _release(self, sequence: Sequence) -> None:
        self.reuse.end_prefill(sequence)
        self.blocks.release(sequence.block_table)
        sequence.forget_computed()


def _same_prompt(sequence: Sequence, other: Sequence) -> bool:
    a, b = sequence.request, other.request
    return (a.tenant, a.adapter, a.prompt_ids) == (b.tenant, b.adapter, b.prompt_ids)
