"""Continuous batching over a paged KV cache: which tokens of which requests are computed in the next step.

A pure state machine: ``add`` and ``abort`` tell it what happened, ``schedule`` forms a step, and one of
``update``, ``fail`` and ``requeue`` tells how the step went. The time is handed in; nothing is read, written
or waited for.

* Requests are served in order of arrival. A running request gets a token in every step; what the budget
  leaves goes to prefills, in pieces, and then to waiting requests. So at most the youngest running request is
  in its prefill.
* Blocks are taken as sequences grow. When none is free, an older sequence takes those of the youngest, which
  goes back to the front of the queue and is later recomputed from its tokens (prompt and generated). The
  youngest itself waits. So the oldest request moves forward in every step, and an admitted request always
  comes to its end.
* Every admitted request yields its tokens once, in order, and exactly one event with ``finish``.

Sources: continuous batching is Orca's (Yu et al., OSDI 2022), paging and preemption by recomputation are
vLLM's (arXiv 2309.06180), chunked prefill beside decode is Sarathi-Serve's (arXiv 2403.02310).
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
)
from actors.engine.kv_blocks import BlockPool
from actors.engine.lineup import Lineup
from actors.engine.plan import Chunk, StepPlan
from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.engine.sequence import Sequence, Status

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

_Shares = list[tuple[Sequence, int]]


class Scheduler:
    """Forms the steps of one attention shard. See the module's text for what is promised."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockPool) -> None:
        """``blocks`` belongs to this scheduler from now on."""
        self.limits = limits
        self.blocks = blocks
        self._lineup = Lineup(blocks)
        self._n_arrived = 0
        self._events: list[TokenEvent] = []
        self._plan: StepPlan | None = None
        self._step: _Shares = []
        self._pace = Pace()

    @property
    def n_running(self) -> int:
        return len(self._lineup.running)

    @property
    def n_waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._lineup.waiting)

    @property
    def n_preempted(self) -> int:
        """How often a running request was sent back to the queue for want of blocks, since the start."""
        return self._lineup.n_preempted

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to tell: ``schedule`` need not be called before the next ``add``."""
        return not len(self._lineup) and not self._events

    def add(self, request: GenerationRequest, now: float) -> None:
        """Admit a request into the queue. Errors: NeverFits, DuplicateRequest, and QueueFull unless it is a replay."""
        request_id = request.request_id
        if self._lineup.get(request_id) or any(event.request_id == request_id for event in self._events):
            raise DuplicateRequest(request_id)
        check_fits(request, self.limits, self.blocks)
        if self.n_waiting >= self.limits.max_waiting and not request.replay:
            raise QueueFull(self.n_waiting, self._pace.retry_after_s(now))
        deadline = None if request.timeout_s is None else now + request.timeout_s
        self._lineup.join(Sequence(request, self._n_arrived, deadline))
        self._n_arrived += 1

    def add_all(self, requests: SequenceOf[GenerationRequest], now: float) -> None:
        """Admit all of them, in order, or none. Errors: as ``add``."""
        added: list[str] = []
        try:
            for request in requests:
                self.add(request, now)
                added.append(request.request_id)
        except AdmissionError:
            for request_id in added:
                sequence = self._lineup.get(request_id)
                assert sequence is not None
                self._lineup.remove(sequence)
            raise

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
        """Form the next step; RuntimeError while the last one has no ``update``, ``fail`` or ``requeue``.

        A plan without chunks is over already: it may be passed to ``update``, and need not be.
        """
        if self._plan is not None:
            raise RuntimeError("the step before has not been resolved by update, fail or requeue")
        self._end_expired(now)
        shares = self._share_budget()
        step = self._secure_blocks(shares)
        step += self._start_waiting(self.limits.token_budget - sum(n for _, n in shares), now)
        chunks = tuple(sequence.chunk(n, self.blocks.block_size) for sequence, n in step)
        plan = StepPlan(chunks, tuple(self._take_events()), self._lineup.take_preempted())
        if chunks:
            self._plan, self._step = plan, step
        return plan

    def update(
        self, plan: StepPlan, tokens: SequenceOf[int | None], failures: Mapping[str, str] | None = None
    ) -> list[TokenEvent]:
        """The step was computed. ``tokens``: one for each of ``plan.sampled``, or None if it has none.

        ``failures`` (request id → message) names chunks whose result cannot be used; their requests end with
        ERROR, as those without a token do. Returns the events to publish. ValueError when tokens or failures
        do not match the plan; the step is then still unresolved.
        """
        failures = failures or {}
        self._check_results(plan, tokens, failures)
        drawn = iter(tokens)
        for chunk, (sequence, n) in zip(plan.chunks, self._close(plan), strict=True):
            token = next(drawn) if chunk.draw else None
            if sequence.status is Status.ENDED:
                continue
            if chunk.request_id in failures:
                self._end(sequence, FinishReason.ERROR, failures[chunk.request_id])
            elif chunk.draw is None:
                sequence.n_computed += n
            elif token is None:
                self._end(sequence, FinishReason.ERROR, f"no token could be drawn at index {chunk.draw.index}")
            else:
                sequence.n_computed += n
                self._accept(sequence, token)
        return self._take_events()

    def fail(self, plan: StepPlan, reason: FinishReason, message: str) -> list[TokenEvent]:
        """The step could not be computed: end its requests, and no others, with ``reason``."""
        for sequence, _ in self._close(plan):
            if sequence.status is not Status.ENDED:
                self._end(sequence, reason, message)
        return self._take_events()

    def requeue(self, plan: StepPlan) -> None:
        """The step is to be formed and computed anew, whatever of it was written to the cache."""
        self._close(plan)

    def check(self) -> None:
        """Assert what must hold between any two calls. For tests."""
        self._lineup.check()
        assert self.n_running <= self.limits.max_running
        if self._plan is None:
            assert not self._step

    def _end_expired(self, now: float) -> None:
        late = [s for s in self._lineup if s.deadline is not None and s.deadline <= now]
        for sequence in late:
            self._end(sequence, FinishReason.DEADLINE)

    def _share_budget(self) -> _Shares:
        """Tokens for each running sequence, by arrival: one that decodes gets 1, a prefill what is left."""
        left = self.limits.token_budget - sum(s.n_uncomputed == 1 for s in self._lineup.running)
        shares: _Shares = []
        for sequence in self._lineup.running:
            n = 1
            if sequence.n_uncomputed > 1:
                n = min(sequence.n_uncomputed, left)
                left -= n
            shares.append((sequence, n))
        return shares

    def _secure_blocks(self, shares: _Shares) -> _Shares:
        """The shares for which there are blocks, oldest first; the youngest are preempted for older ones."""
        step: _Shares = []
        for sequence, share in shares:
            if sequence.status is Status.RUNNING and (n := self._lineup.grow(sequence, share)):
                step.append((sequence, n))
        return step

    def _start_waiting(self, left: int, now: float) -> _Shares:
        """Start waiting sequences, in order, while tokens, places and blocks are left."""
        lineup = self._lineup
        step: _Shares = []
        while left and lineup.waiting and len(lineup.running) < self.limits.max_running:
            if not lineup.has_room_for(lineup.waiting[0]):
                break
            sequence = lineup.start()
            self._pace.started(now)
            n = lineup.grow(sequence, min(sequence.n_uncomputed, left))
            step.append((sequence, n))
            left -= n
        return step

    def _check_results(self, plan: StepPlan, tokens: SequenceOf[int | None], failures: Mapping[str, str]) -> None:
        if len(tokens) != len(plan.sampled):
            raise ValueError(f"tokens has {len(tokens)} entries, the plan samples {len(plan.sampled)}")
        if strangers := failures.keys() - {chunk.request_id for chunk in plan.chunks}:
            raise ValueError(f"failures names {sorted(strangers)}, which have no chunk in the plan")

    def _close(self, plan: StepPlan) -> _Shares:
        """The sequences of the step, now over. RuntimeError if ``plan`` is not the one being computed."""
        if not plan.chunks:
            return []
        if plan is not self._plan:
            raise RuntimeError("this plan is not the step being computed: it is another's, or was resolved")
        step, self._plan, self._step = self._step, None, []
        return step

    def _accept(self, sequence: Sequence, token: int) -> None:
        index = sequence.n_generated
        sequence.token_ids.append(token)
        finish = sequence.finish_reason(self.limits.context_length)
        self._events.append(TokenEvent(sequence.request.request_id, index, token, finish))
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
