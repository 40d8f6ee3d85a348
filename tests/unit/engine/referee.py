"""Watches one scheduler from outside and checks its policy: who is served, who waits for whom, who gives way.

It keeps its own account of what was served to whom, from plans and events alone, and holds the scheduler's counters
and decisions against it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from actors.engine.plan import Chunk, StepPlan
from actors.engine.request import Priority, TokenEvent
from actors.engine.scheduler import Scheduler
from actors.engine.sequence import Sequence

Account = tuple[Priority, str]  # a class and a tenant

_ROUNDING = 1e-6


@dataclass
class Wait:
    """A request that was never started, since it is in its class. ``served``: to all accounts, when it came there."""

    account: Account
    served: Counter[Account]
    ahead: int  # tokens that its tenant's requests may get before it
    debt: float  # how far its tenant's counter then was above the least one


class Referee:
    """Call ``seen`` after whatever changed the scheduler, and ``before``, ``planned`` and ``told`` around each step.

    The bounds come from VTC (Sheng et al., OSDI 2024, Lemma 4.3 and Theorem 4.4). Tenant a's request starts only while
    no waiting tenant b has a lower counter. From then on a's counter grows by what its requests in flight still get,
    at most M = the tokens of all that may be in flight: so a's counter is never more than M / share above b's.
    """

    def __init__(self, scheduler: Scheduler, most_choices: int) -> None:
        """``most_choices``: of one request, which may wait for each other, and hand each other their places."""
        self.scheduler = scheduler
        self.most_choices = most_choices
        self.served: Counter[Account] = Counter()
        self.shares: dict[str, float] = {}
        limits = scheduler.limits
        # Those that run, and as many that were preempted before others started: batch ones, that others awaited.
        self.in_flight = 2 * limits.max_running * most_choices * limits.context_length
        self._charged: Counter[str] = Counter()  # given tokens of a request that are paid
        self._members: dict[Account, set[str]] = {}
        self._unpaid: dict[Account, float] = {}  # what an account's counter had when it became active
        self._least: dict[Priority, float] = {}
        self._rivals: dict[tuple[Account, Account], float] = {}
        self._waits: dict[str, Wait] = {}
        self._started: set[str] = set()
        self._tables: dict[str, int] = {}
        self._measures = False

    # -- the account ------------------------------------------------------------------------------------------------

    def seen(self) -> None:
        """Nothing was computed since the last call; requests may have come, ended, or changed their class."""
        before, self._members = self._members, self._of_accounts()
        for account, names in self._members.items():
            if names.isdisjoint(before.get(account, ())):
                self._unpaid[account] = self._counter(account) - self._virtual(account)
            assert abs(self._counter(account) - self._virtual(account) - self._unpaid[account]) < _ROUNDING
        self._check_time_moves_forward()
        self._note_waits(before)

    def _of_accounts(self) -> dict[Account, set[str]]:
        members = defaultdict(set)
        for sequence in self.scheduler._lineup:
            members[_account(sequence)].add(sequence.request.request_id)
            self.shares[sequence.request.tenant] = sequence.request.share
        return dict(members)

    def _counter(self, account: Account) -> float:
        priority, tenant = account
        return self.scheduler._lineup.waiting._lines[priority].counters[tenant]

    def _virtual(self, account: Account) -> float:
        return self.served[account] / self.shares[account[1]]

    def _check_time_moves_forward(self) -> None:
        """The least counter of those who are active never falls: nobody saves up turns while idle."""
        for priority in {priority for priority, _ in self._members}:
            least = min(self._counter(account) for account in self._members if account[0] is priority)
            assert least > self._least.get(priority, 0.0) - _ROUNDING
            self._least[priority] = least

    # -- a step -----------------------------------------------------------------------------------------------------

    def before(self) -> None:
        """A step is about to be formed."""
        self._tables = {s.request.request_id: len(s.block_table) for s in self.scheduler._lineup.running}
        bound = self.scheduler._gap_bound
        decoding = [s for s in self.scheduler._lineup.running if s.decodes]
        streams = any(s.request.priority is Priority.INTERACTIVE for s in decoding)
        self._measures = streams and bound._n_mixed.get(len(decoding).bit_length(), 0) >= bound._REMEASURE

    def planned(self, plan: StepPlan, now: float) -> None:
        """The step was formed."""
        get = self.scheduler._lineup.get
        begun = [chunk for chunk in plan.all_chunks if chunk.request_id not in self._tables]
        in_pieces = {id(chunk) for piece in plan.pieces for chunk in piece.chunks}
        self._started |= {chunk.request_id for chunk in begun}
        for chunk in plan.all_chunks:
            sequence = get(chunk.request_id)
            assert sequence is not None
            end = min(chunk.start + len(chunk.token_ids), sequence.n_given)
            n_new = end - max(chunk.start, self._charged[chunk.request_id])
            # A prompt's last token that was left over by its pieces is computed as a decode row, and free.
            is_prefill = chunk.draw is None or len(chunk.token_ids) > 1 or chunk in begun or id(chunk) in in_pieces
            if n_new > 0 and is_prefill:
                self.served[_account(sequence)] += n_new
                self._charged[chunk.request_id] = end
        self.seen()
        self._check_nobody_gives_way_in_vain(plan)
        self._check_room_is_left(plan, begun)
        self._check_interactive_comes_first(plan, begun)
        self._check_patience(plan, now)
        self._check_rivals()
        self._check_waits()
        self._check_decodes_are_measured(plan)

    def told(self, events: Iterable[TokenEvent]) -> None:
        """The step is over, or a request was ended; one token each is served with the events that have one."""
        of = {name: account for account, names in self._members.items() for name in names}
        for event in events:
            if event.token is not None:
                self.served[of[event.request_id]] += 1
        self.seen()

    def _check_nobody_gives_way_in_vain(self, plan: StepPlan) -> None:
        """Who was preempted made room for one of a lower rank, which starts or grows in this very step."""
        if not plan.preempted:
            return
        copied = {target for _, target in plan.copies}
        gained = [
            self._sequence(chunk).rank
            for chunk in plan.all_chunks
            if len(chunk.block_table) > self._tables.get(chunk.request_id, -1) or copied & set(chunk.block_table)
        ]
        for name in plan.preempted:
            victim = self.scheduler._lineup.get(name)
            assert victim is not None
            assert any(rank < victim.rank for rank in gained)

    def _check_room_is_left(self, plan: StepPlan, begun: list[Chunk]) -> None:
        """A newcomer leaves a block for each of the others, or it would soon be preempted by them."""
        if not begun:
            return
        blocks, newcomer = self.scheduler.blocks, max((self._sequence(chunk) for chunk in begun), key=lambda s: s.rank)
        behind = [chunk for chunk in plan.all_chunks if self._sequence(chunk).rank > newcomer.rank]
        if behind:
            return  # others took blocks after it
        missing = blocks.needed(len(newcomer.token_ids)) - len(newcomer.block_table)
        assert missing + self.scheduler.n_running - 1 <= blocks.n_free

    def _check_interactive_comes_first(self, plan: StepPlan, begun: list[Chunk]) -> None:
        lineup, limits = self.scheduler._lineup, self.scheduler.limits
        waiting = [s for s in lineup.waiting if s.priority is Priority.INTERACTIVE]
        if not waiting:
            return
        # It waits for interactive ones, directly or for their prompts; but for a step that decodes fill up.
        full = sum(len(chunk.token_ids) for chunk in plan.all_chunks) == limits.token_budget
        assert full or any(s.priority is Priority.INTERACTIVE for s in lineup.running)
        if any(self._sequence(chunk).priority is Priority.BATCH for chunk in begun):
            assert not any(self._never_held(s) for s in waiting)

    def _check_patience(self, plan: StepPlan, now: float) -> None:
        """Where batch requests have waited long, one counts as interactive, so that others wait for one at most."""
        batch = [s for s in self.scheduler._lineup if s.request.priority is Priority.BATCH]
        aged = [s for s in batch if s.patient_until <= now]
        promoted = [s for s in batch if s.priority is Priority.INTERACTIVE]
        assert promoted or not aged or plan.events  # perhaps its end
        assert all(s in aged for s in promoted)
        assert len(promoted) <= 1

    def _check_decodes_are_measured(self, plan: StepPlan) -> None:
        """Once in a while a step beside streams has decodes alone, or, where these find no blocks, prefills alone."""
        if self._measures and not plan.events:  # of a stream, perhaps the last one
            decodes = [
                c.draw is not None and len(c.token_ids) == 1 and c.request_id in self._tables for c in plan.chunks
            ]
            assert all(decodes) or not any(decodes)

    # -- waiting ----------------------------------------------------------------------------------------------------

    def _never_held(self, sequence: Sequence) -> bool:
        """It does not let others pass, because there is nothing that it could find."""
        return sequence.wants_prompt_rows or not (self.scheduler.limits.prefix_cache or self.most_choices > 1)

    def _check_rivals(self) -> None:
        """Of two tenants that both wait, neither is more than M / share ahead, unless it was so from the beginning."""
        backlogged = {w.account for name, w in self._waits.items() if name in self._members.get(w.account, ())}
        rivals = {}
        for a, b in permutations(backlogged, 2):
            if a[0] is b[0]:
                ahead = self._counter(a) - self._counter(b)
                most = self._rivals.get((a, b), max(ahead, 0.0) + self.in_flight / self.shares[a[1]])
                assert ahead < most + _ROUNDING
                rivals[a, b] = most
        self._rivals = rivals

    def _note_waits(self, before: dict[Account, set[str]]) -> None:
        waiting = {s.request.request_id: s for s in self.scheduler._lineup.waiting if self._never_held(s)}
        # Who changes its class brings along what it still has to get: all waiting in that class begins anew.
        known = set().union(*before.values())
        changed = {p for (p, t), names in self._members.items() if names & known - before.get((p, t), set())}
        self._waits = {n: w for n, w in self._waits.items() if n in waiting and w.account == _account(waiting[n])}
        for name, sequence in waiting.items():
            account = _account(sequence)
            if name not in self._started and (name not in self._waits or account[0] in changed):
                debt = self._counter(account) - self._least[account[0]]
                self._waits[name] = Wait(account, self.served.copy(), self._tokens_ahead(account[1]), debt)

    def _tokens_ahead(self, tenant: str) -> int:
        longest = self.scheduler.limits.context_length
        requests = [s.request for s in self.scheduler._lineup if s.request.tenant == tenant]
        places = self.in_flight if self.most_choices > 1 else 0
        return places + sum(min(len(r.prompt_ids) + r.max_tokens, longest) for r in requests)

    def _check_waits(self) -> None:
        """While a request waits, its tenant gets no more than those before it may take, which is A tokens at most.

        Every other tenant of its class gets at most A, by their shares, and M, and the debt of the request's tenant.
        """
        for name, wait in self._waits.items():
            if name in self._started:
                continue
            mine = wait.account
            assert self.served[mine] - wait.served[mine] <= wait.ahead
            for account in self._members:
                if account[0] is mine[0] and account != mine:
                    share = self.shares[account[1]]
                    most = wait.ahead / self.shares[mine[1]] + self.in_flight / share + wait.debt
                    assert self.served[account] - wait.served[account] <= most * share + _ROUNDING

    def _sequence(self, chunk: Chunk) -> Sequence:
        sequence = self.scheduler._lineup.get(chunk.request_id)
        assert sequence is not None
        return sequence


def _account(sequence: Sequence) -> Account:
    return sequence.priority, sequence.request.tenant
