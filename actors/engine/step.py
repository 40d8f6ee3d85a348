"""The step that is being formed: how many tokens of which sequence."""

from __future__ import annotations

from actors.engine.lineup import Lineup
from actors.engine.pacing import GapBound
from actors.engine.request import Priority
from actors.engine.sequence import Sequence, Status


class Step:
    """``shares``: sequences with the tokens that each gets. ``left``: prompt tokens for which there is still room;
    those of decodes were put aside. ``context``: the most tokens that any prompt had before its piece.
    """

    def __init__(self, lineup: Lineup, token_budget: int, gap_bound: GapBound) -> None:
        """An empty step. ``gap_bound`` counts where a stream of an interactive request is decoding."""
        decoding = [s for s in lineup.running if s.n_uncomputed == 1]
        streams = any(s.request.priority is Priority.INTERACTIVE for s in decoding)
        bound = gap_bound.allowance(len(decoding)) if streams else None
        self.shares: list[tuple[Sequence, int]] = []
        self.left = token_budget - len(decoding)
        self.n_decodes = self.n_prefill = self.context = 0
        self._lineup = lineup
        self._unbounded = self.left
        self._gap_bound = None if bound is None else gap_bound
        if bound is not None:
            self.left = min(self.left, bound)

    def form(self) -> None:
        """Give tokens to the running sequences and start waiting ones; never to none while one is running."""
        self._form()
        if not self.shares and self._gap_bound is not None:
            # Prefills were left out, and the decodes have no room to be measured in: there is no gap to bound.
            self.left, self._gap_bound = self._unbounded, None
            self._form()

    def _form(self) -> None:
        """Class by class."""
        queue_moves = True
        for priority in Priority:
            self._advance(priority)
            queue_moves = queue_moves and self._start_waiting(priority)

    def _advance(self, priority: Priority) -> None:
        """The running sequences of a class, by rank: those that decode get 1 token, prefills what is left."""
        for sequence in tuple(self._lineup.running):
            if sequence.priority is not priority or sequence.status is not Status.RUNNING:
                continue  # of another class, or preempted by one of those before
            if sequence.n_uncomputed > 1:
                if (wanted := self._piece(sequence)) and (n := self._lineup.grow(sequence, wanted)):
                    self._prefill(sequence, n)
            elif self._lineup.grow(sequence, 1):
                self.shares.append((sequence, 1))
                self.n_decodes += 1

    def _start_waiting(self, priority: Priority) -> bool:
        """Start waiting sequences of a class, in order, while tokens are left; False if there is no room for one."""
        for sequence in self._lineup.waiting.in_order(priority):
            if not self.left:
                return False
            if self._lineup.reuse.held(sequence):
                continue
            if not self._lineup.start(sequence):
                return False
            self._prefill(sequence, self._lineup.grow(sequence, self._piece(sequence)))
        return True

    def _piece(self, sequence: Sequence) -> int:
        """How many of its tokens a prefill may compute; a prompt far longer than those measured begins small."""
        n = min(sequence.n_uncomputed, self.left)
        bound = self._gap_bound.first_allowance(sequence.n_computed) if self._gap_bound else None
        return n if bound is None else min(n, bound)

    def _prefill(self, sequence: Sequence, n_tokens: int) -> None:
        self.shares.append((sequence, n_tokens))
        self.left -= n_tokens
        self.n_prefill += n_tokens
        self.context = max(self.context, sequence.n_computed)
        # What is computed again after a preemption is charged once: the tenant is not to blame.
        end = min(sequence.n_computed + n_tokens, sequence.n_given)
        if (n_new := end - max(sequence.n_computed, sequence.n_charged)) > 0:
            self._lineup.waiting.charge(sequence, n_new)
            sequence.n_charged = end
