"""The step that is being formed: how many tokens of which sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.engine.lineup import Lineup
from actors.engine.pacing import GapBound
from actors.engine.plan import Chunk, Pace, Piece
from actors.engine.request import Priority
from actors.engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Share:
    """``n_tokens`` of a sequence from position ``start`` on, in its ``run``."""

    sequence: Sequence
    start: int
    n_tokens: int
    run: int

    @property
    def lives(self) -> bool:
        """The sequence still runs, and has what it had when the share was made."""
        return self.sequence.status is Status.RUNNING and self.sequence.run == self.run

    def chunk(self, block_size: int) -> Chunk:
        return self.sequence.chunk(self.start, self.n_tokens, block_size)


@dataclass(slots=True)
class OpenPiece:
    """A piece of prefills that is under way: whose tokens, of those that still run. ``context``: the most tokens that
    any prompt had before it."""

    number: int
    shares: list[Share] = field(default_factory=list)
    context: int = 0

    @property
    def rows(self) -> int:
        return sum(share.n_tokens for share in self.shares)

    def add(self, share: Share) -> None:
        self.shares.append(share)
        share.sequence.n_under_way += share.n_tokens
        self.context = max(self.context, share.start)

    def drop_ended(self) -> None:
        """Those that ended or were preempted are no part of it any more."""
        self.shares = [share for share in self.shares if share.lives]

    def piece(self, block_size: int) -> Piece:
        return Piece(self.number, tuple(share.chunk(block_size) for share in self.shares))


class Step:
    """``shares``: of the chunks that are computed to their end. ``pieces``: all that are under way, in order.
    ``left``: prompt tokens for which there is still room; those of decodes and pieces were put aside. ``pace``: where
    interactive streams are decoding; prefills go into pieces then.
    """

    MOST_PIECES = 2
    """So that a step goes on with the second when it has come to the end of the first."""

    def __init__(self, lineup: Lineup, token_budget: int, gap_bound: GapBound, pieces: list[OpenPiece]) -> None:
        """An empty step; ``pieces``: those that are under way."""
        decoding = [s for s in lineup.running if s.decodes]
        streams = any(s.request.priority is Priority.INTERACTIVE for s in decoding)
        self.pace: Pace | None = gap_bound.pace(len(decoding)) if streams else None
        self.shares: list[Share] = []
        self.pieces = pieces
        self.left = token_budget - len(decoding) - sum(piece.rows for piece in pieces)
        self.n_decodes = 0
        self._lineup = lineup
        self._gap_bound = gap_bound
        self._new: OpenPiece | None = None

    def form(self, number: int) -> None:
        """Give tokens to the running sequences and start waiting ones; never to none while one is running. A new piece
        gets this ``number``."""
        if self.pace is not None and self.pace.limit_s and len(self.pieces) < self.MOST_PIECES:
            self._new = OpenPiece(number)
        self._form()
        if self._new is not None and self._new.shares:
            self.pieces.append(self._new)
        for piece in self.pieces:
            piece.drop_ended()
        self.pieces = [piece for piece in self.pieces if piece.shares]
        if not self.shares and self.pace is not None:
            # Prefills were left out, and the decodes have no room to be measured in: there is no gap to bound.
            self.pace, self._new = None, None
            if not self.pieces:
                self._form()

    @property
    def decodes_alone(self) -> bool:
        """Nothing of a prefill is computed to its end."""
        return len(self.shares) == self.n_decodes

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
            if sequence.decodes:
                if self._lineup.grow(sequence, 1):
                    self.shares.append(Share(sequence, sequence.n_computed, 1, sequence.run))
                    self.n_decodes += 1
            elif sequence.n_under_way:
                self._go_on(sequence)
            elif (wanted := self._wanted(sequence)) and (n := self._lineup.grow(sequence, wanted)):
                self._prefill(sequence, n)

    def _go_on(self, sequence: Sequence) -> None:
        """It is part of a piece, whose blocks have to be its own still, and of the next one where that has room."""
        under_way = sequence.n_under_way
        more = min(sequence.n_uncomputed - under_way, self._room(sequence)) if self._new else 0
        n = self._lineup.grow(sequence, under_way + more)
        if n < under_way:
            sequence.lose_under_way()
        elif n > under_way:
            self._prefill(sequence, n - under_way)

    def _start_waiting(self, priority: Priority) -> bool:
        """Start waiting sequences of a class, in order, while tokens are left; False if there is no room for one."""
        for sequence in self._lineup.waiting.in_order(priority):
            if not self._room(sequence):
                return False
            if self._lineup.reuse.held(sequence):
                continue
            if not self._lineup.start(sequence):
                return False
            self._prefill(sequence, self._lineup.grow(sequence, max(1, self._wanted(sequence))))
        return True

    def _wanted(self, sequence: Sequence) -> int:
        """How many of its tokens a prefill may compute."""
        return min(sequence.n_uncomputed, self._room(sequence))

    def _room(self, sequence: Sequence) -> int:
        """For tokens of its prefill."""
        if self.pace is None:
            return self.left
        if self._new is None:
            return 0
        rows = self._gap_bound.rows(self.pace, sequence.n_computed + sequence.n_under_way)
        return max(0, min(self.left, rows - self._new.rows))

    def _prefill(self, sequence: Sequence, n_tokens: int) -> None:
        start = sequence.n_computed + sequence.n_under_way
        share = Share(sequence, start, n_tokens, sequence.run)
        if self._new is None or sequence.decodes:  # its prompt was found, but for the last token: a row like a decode's
            self.shares.append(share)
        else:
            self._new.add(share)
        self.left -= n_tokens
        # What is computed again after a preemption is charged once: the tenant is not to blame.
        end = min(start + n_tokens, sequence.n_given)
        if (n_new := end - max(start, sequence.n_charged)) > 0:
            self._lineup.waiting.charge(sequence, n_new)
            sequence.n_charged = end
