"""Continuous batching over a paged KV cache: which tokens of which requests are computed in the next step.

A pure state machine: ``add`` and ``abort`` tell it what happened, ``schedule`` forms a step, and ``update`` or ``fail``
tells how the step went. The time is handed in; nothing is read, written or waited for.

* Every admitted request yields its tokens once, in order, and exactly one event with ``finish``.
* Interactive requests come before batch ones. So that these do not starve, the oldest of them counts as an interactive
  one that comes when its ``batch_patience_s`` are over, one at a time. Within a class those that were preempted come
  first; then the tenant that was served least for its share, and of its requests the oldest. None overtakes another for
  want of blocks.
* A running request gets a token in every step; what the budget leaves goes to prefills, in pieces. Beside interactive
  streams the pieces are such that a step takes at most ``max_gap`` times as long as without (see ``pacing``).
* What was computed before is not computed again (see ``reuse``): prompts share the blocks of their common beginning,
  the choices of one request all of its prompt. Who needs what is just being computed lets others pass meanwhile; a
  choice that ends leaves its place to one that waits, where the prompt would be lost to it otherwise.
* Blocks are taken as sequences grow. When none is free, the one that is last by class and age gives up its own, and is
  later recomputed from its tokens. The first of the running ones always moves forward, and an admitted request comes
  to its end. (One step in a few hundred may leave prefills out, to measure decodes alone.)
* KV that never led to a token is never shared: a row that is not finite harms its own request alone.

Sources: continuous batching is Orca's (Yu et al., OSDI 2022), paging and preemption by recomputation are vLLM's (arXiv
2309.06180), chunked prefill beside decode is Sarathi-Serve's (arXiv 2403.02310), fairness is VTC's (Sheng et al., OSDI
2024), and shared prefixes are vLLM's and SGLang's (RadixAttention, arXiv 2312.07104).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from actors.engine.admission import (
    AdmissionError,
    DuplicateRequest,
    NeverFits,
    Pace,
    QueueFull,
    SchedulerLimits,
    check_fits,
    check_queue,
)
from actors.engine.kv_blocks import BlockPool
from actors.engine.lineup import Lineup
from actors.engine.pacing import GapBound
from actors.engine.plan import Chunk, Progress, StepPlan, drawing
from actors.engine.prefix import PrefixKeys
from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.engine.sequence import Sequence, Status
from actors.engine.step import OpenPiece, Share, Step

__all__ = [
    "AdmissionError",
    "Chunk",
    "DuplicateRequest",
    "NeverFits",
    "QueueFull",
    "Scheduler",
    "SchedulerLimits",
    "StepPlan",
]


_NO_PIECES = Progress()


class Scheduler:
    """Forms the steps of one attention shard. See the module's text for what is promised."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockPool) -> None:
        """``blocks`` belongs to this scheduler from now on."""
        self.limits = limits
        self.blocks = blocks
        self._lineup = Lineup(blocks, limits.max_running, limits.prefix_cache)
        self._events: list[TokenEvent] = []
        self._computing: tuple[StepPlan, Step] | None = None
        self._pace = Pace()
        self._gap_bound = GapBound(limits.max_gap, limits.layers)
        self._pieces: list[OpenPiece] = []  # under way
        self._n_steps = 0

    @property
    def n_running(self) -> int:
        return len(self._lineup.running)

    @property
    def n_waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._lineup.waiting)

    @property
    def n_preempted(self) -> int:
        """How often a running request was sent back to the queue for want of blocks or places, since the start."""
        return self._lineup.n_preempted

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens of requests that were looked for in the prefix cache, each time one started, since the start.

        Not of those that wanted log-probabilities of the prompt, which are not looked for, nor of choices that had the
        prompt from another one of their request.
        """
        return self._lineup.reuse.queried_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """Those of ``prefix_queried_tokens`` whose KV was found."""
        return self._lineup.reuse.hit_tokens

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to tell: ``schedule`` need not be called before the next ``add``."""
        return not len(self._lineup) and not self._events

    def add(self, request: GenerationRequest, now: float) -> None:
        """Admit a request into the queue. Errors: NeverFits, DuplicateRequest, and QueueFull unless it is a replay."""
        self.add_all((request,), now)

    def add_all(self, requests: SequenceOf[GenerationRequest], now: float) -> None:
        """Admit all of these, or none: the choices of one request, the leader first. Errors as of ``add``."""
        untold = {event.request_id for event in self._events}
        for n, request in enumerate(requests):
            name = request.request_id
            if self._lineup.get(name) or name in untold or any(r.request_id == name for r in requests[:n]):
                raise DuplicateRequest(name)
            check_fits(request, self.limits, self.blocks)
        self._check_queue([request for request in requests if not request.replay], now)
        for request in requests:
            self._admit(request, now)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED, message: str = "") -> bool:
        """End a request now, between any two calls; False when there is none of this id.

        Its blocks are free at once, and its end is among the next events handed out. If it is part of the
        step being computed, that step's result is dropped for it.
        """
        sequence = self._lineup.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, reason, message)
        return True

    def schedule(self, now: float) -> StepPlan:
        """Form the next step; RuntimeError while the last one has no ``update`` or ``fail``.

        An empty plan is over already: it may be passed to ``update``, and need not be.
        """
        if self._computing is not None:
            raise RuntimeError("the step before has not been resolved by update or fail")
        self._lineup.end_patience(now)
        self._end_expired(now)
        for piece in self._pieces:
            piece.drop_ended()
        self._n_steps += 1
        step = Step(self._lineup, self.limits.token_budget, self._gap_bound, [p for p in self._pieces if p.shares])
        step.form(self._n_steps)
        self._pieces = step.pieces
        self._pace.started(now, self._lineup.take_started())
        plan = StepPlan(
            chunks=tuple([share.chunk(self.blocks.block_size) for share in step.shares]),
            events=tuple(self._take_events()),
            preempted=self._lineup.take_preempted(),
            copies=self._lineup.take_copies(),
            pieces=tuple([piece.piece(self.blocks.block_size) for piece in step.pieces]),
            pace=step.pace,
        )
        if not plan.empty:
            self._computing = plan, step
        return plan

    def update(
        self,
        plan: StepPlan,
        tokens: SequenceOf[int | None],
        failures: Mapping[str, str] | None = None,
        elapsed_s: float | None = None,
        progress: Progress = _NO_PIECES,
    ) -> list[TokenEvent]:
        """The step was computed. ``tokens``: one for each of ``plan.sampled``, or None if it has none; ``progress``:
        how far its pieces came.

        ``failures`` (request id → message) names chunks whose result cannot be used; their requests end with
        ERROR, as those without a token do. ``elapsed_s``: what the step took; without it gaps are not bounded.
        Returns the events to publish. ValueError when tokens, progress or failures do not match the plan; the step is
        then still unresolved.
        """
        failures = failures or {}
        self._check_results(plan, tokens, failures, progress)
        step = self._close(plan)
        if step is None:
            return self._take_events()
        if elapsed_s is not None:
            self._measure(step, progress, elapsed_s)
        self._computed(step.shares, plan.chunks, tokens, failures)
        finished = len(progress.finished)
        for piece, planned, drawn in zip(step.pieces, plan.pieces, progress.finished, strict=False):
            for share in piece.shares:
                share.sequence.n_under_way -= share.n_tokens
            self._computed(piece.shares, planned.chunks, drawn, failures)
        self._pieces = step.pieces[finished:]
        for chunk in (chunk for planned in plan.pieces[finished:] for chunk in planned.chunks):
            if chunk.request_id in failures and (sequence := self._lineup.get(chunk.request_id)) is not None:
                self._end(sequence, FinishReason.ERROR, failures[chunk.request_id])
        return self._take_events()

    def fail(self, plan: StepPlan, reason: FinishReason, message: str) -> list[TokenEvent]:
        """The step could not be computed: end its requests, and no others, with ``reason``."""
        step = self._close(plan)
        if step is not None:
            for share in (*step.shares, *(share for piece in step.pieces for share in piece.shares)):
                if share.sequence.status is not Status.ENDED:
                    self._end(share.sequence, reason, message)
            self._pieces = []
        return self._take_events()

    def check(self) -> None:
        """Assert what must hold between any two calls. For tests."""
        self._lineup.check()

    def _computed(
        self,
        shares: SequenceOf[Share],
        chunks: SequenceOf[Chunk],
        tokens: SequenceOf[int | None],
        failures: Mapping[str, str],
    ) -> None:
        """These shares, of these chunks, were computed to their end, and ``tokens`` drawn."""
        drawn = iter(tokens)
        for chunk, share in zip(chunks, shares, strict=True):
            sequence, token = share.sequence, next(drawn) if chunk.draw else None
            if sequence.status is Status.ENDED:
                continue
            if chunk.request_id in failures:
                self._end(sequence, FinishReason.ERROR, failures[chunk.request_id])
            elif chunk.draw is None:
                sequence.n_computed += share.n_tokens
            elif token is None:
                self._end(sequence, FinishReason.ERROR, f"no token could be drawn at index {chunk.draw.index}")
            else:
                sequence.n_computed += share.n_tokens
                self._accept(sequence, token)

    def _measure(self, step: Step, progress: Progress, elapsed_s: float) -> None:
        alone = step.n_decodes if step.decodes_alone and not progress.passes else 0
        if step.pace is not None and progress.passes:
            piece = step.pieces[0]
            self._gap_bound.measured_beside(
                step.pace, step.n_decodes, piece.rows, progress.passes, piece.context, elapsed_s, progress.apart_s
            )
        else:
            self._gap_bound.measured_alone(alone, elapsed_s)

    def _check_queue(self, requests: list[GenerationRequest], now: float) -> None:
        for priority in {request.priority for request in requests}:
            same = [request for request in requests if request.priority is priority]
            waiting = (sequence.request for sequence in self._lineup.waiting)
            running = (sequence.request for sequence in self._lineup.running)
            retry_after_s = self._pace.retry_after_s(now)
            check_queue(same[0], len(same), waiting, running, self.limits.max_waiting, retry_after_s)

    def _admit(self, request: GenerationRequest, now: float) -> None:
        if request.timeout_s is not None and request.timeout_s <= 0:
            index = len(request.generated_ids)
            self._events.append(TokenEvent(request.request_id, index, None, FinishReason.DEADLINE))
            return
        keys = PrefixKeys(request.tenant, request.adapter, self.blocks.block_size)
        deadline = None if request.timeout_s is None else now + request.timeout_s
        patient_until = now + self.limits.batch_patience_s
        self._lineup.join(Sequence(request, keys, deadline, patient_until))

    def _end_expired(self, now: float) -> None:
        late = [s for s in self._lineup if s.deadline is not None and s.deadline <= now]
        for sequence in late:
            self._end(sequence, FinishReason.DEADLINE)

    def _check_results(
        self, plan: StepPlan, tokens: SequenceOf[int | None], failures: Mapping[str, str], progress: Progress
    ) -> None:
        if len(tokens) != (n_sampled := len(plan.sampled)):
            raise ValueError(f"tokens has {len(tokens)} entries, the plan samples {n_sampled}")
        if failures and (strangers := failures.keys() - {chunk.request_id for chunk in plan.all_chunks}):
            raise ValueError(f"failures names {sorted(strangers)}, which have no chunk in the plan")
        finished = [len(drawn) for drawn in progress.finished]
        wanted = [len(drawing(piece.chunks)) for piece in plan.pieces]
        if finished != wanted[: len(finished)] or (plan.pace is None and len(finished) < len(wanted)):
            raise ValueError(f"progress.finished has {finished} tokens, the plan's pieces sample {wanted}")

    def _close(self, plan: StepPlan) -> Step | None:
        """The step of ``plan``, now over; None if it was empty. RuntimeError if it is not the one being computed."""
        if plan.empty:
            return None
        if self._computing is None or plan is not self._computing[0]:
            raise RuntimeError("this plan is not the step being computed: it is another's, or was resolved")
        step, self._computing = self._computing[1], None
        return step

    def _accept(self, sequence: Sequence, token: int) -> None:
        index, cached = sequence.n_generated, 0 if sequence.n_drawn else sequence.n_cached
        self._lineup.reuse.verified(sequence)
        self._lineup.waiting.charge(sequence, 1)
        sequence.token_ids.append(token)
        finish = sequence.finish_reason(self.limits.context_length)
        self._events.append(TokenEvent(sequence.request.request_id, index, token, finish, cached=cached))
        if finish:
            self._lineup.remove(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason, message: str = "") -> None:
        """End a sequence without a token."""
        event = TokenEvent(sequence.request.request_id, sequence.n_generated, None, reason, message)
        self._events.append(event)
        self._lineup.remove(sequence)

    def _take_events(self) -> list[TokenEvent]:
        events, self._events = self._events, []
        return events
