"""Who waits, and whose turn is next."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from actors.engine.fairness import TokenCounters
from actors.engine.request import Priority
from actors.engine.sequence import Sequence

_BY_ARRIVAL = attrgetter("arrival")


class _Line:
    """The waiting sequences of one class, each list by arrival."""

    def __init__(self) -> None:
        self.preempted: list[Sequence] = []
        self.of_tenant: dict[str, list[Sequence]] = {}
        self.counters = TokenCounters()


class FairQueue:
    """Waiting sequences by class, and what the tenants of each class were served.

    Within a class those that were preempted come first, by arrival; then always the oldest of the tenant that was
    served least for its share.
    """

    def __init__(self) -> None:
        self._lines = {priority: _Line() for priority in Priority}
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line.preempted
            for sequences in line.of_tenant.values():
                yield from sequences

    def enter(self, sequence: Sequence) -> None:
        """The sequence begins to count for its tenant, in its class."""
        self._lines[sequence.priority].counters.join(sequence.request.tenant, sequence.request.share)

    def leave(self, sequence: Sequence) -> None:
        """The sequence no longer counts in its class."""
        self._lines[sequence.priority].counters.leave(sequence.request.tenant)

    def charge(self, sequence: Sequence, n_tokens: int) -> None:
        """So many tokens were computed or generated for it."""
        self._lines[sequence.priority].counters.charge(sequence.request.tenant, n_tokens)

    def push(self, sequence: Sequence) -> None:
        line = self._lines[sequence.priority]
        tenant = sequence.request.tenant
        insort(
            line.preempted if sequence.was_preempted else line.of_tenant.setdefault(tenant, []),
            sequence,
            key=_BY_ARRIVAL,
        )
        self._n += 1

    def remove(self, sequence: Sequence) -> None:
        line, tenant = self._lines[sequence.priority], sequence.request.tenant
        if sequence.was_preempted:
            line.preempted.remove(sequence)
        else:
            line.of_tenant[tenant].remove(sequence)
            if not line.of_tenant[tenant]:
                del line.of_tenant[tenant]
        self._n -= 1

    def in_order(self, priority: Priority) -> Iterator[Sequence]:
        """Those of one class by turns. Between two of them, the one yielded may be removed, and tenants charged."""
        line = self._lines[priority]
        yield from tuple(line.preempted)
        served = line.counters
        turns = {tenant: iter(tuple(sequences)) for tenant, sequences in line.of_tenant.items()}
        heads = {tenant: next(turn) for tenant, turn in turns.items()}
        while heads:
            tenant = min(heads, key=lambda t: (served[t], heads[t].arrival))
            yield heads.pop(tenant)
            if (following := next(turns[tenant], None)) is not None:
                heads[tenant] = following
