"""The steps of an attention shard: schedule → run → tell.

A step's tokens are told when the next one's first rows are with the experts: delivery, and whatever of the answer is
not needed to go on (log-probabilities), is off the steps' way. Without a next step they are told at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

from actors.engine.kv_blocks import BlockPool
from actors.engine.plan import StepPlan
from actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from actors.engine.scheduler import Scheduler, SchedulerLimits
from actors.log_fields import fields
from actors.moe_client import MoEClient, MoEUnavailable
from actors.observer import ShardObserver
from actors.span_log import PUBLISH, SpanLog
from actors.stats import EngineFigures
from actors.step_runner import StepRunner
from actors.timeline import Instant

log = logging.getLogger(__name__)

_NO_LOGPROBS = "log-probabilities could not be computed"

Tell = Callable[[list[TokenEvent]], None]


class _Work(NamedTuple):
    """What the steps so far took; a new one after each, so that who reads it sees whole steps."""

    steps: int = 0
    busy_s: float = 0.0
    experts_wait_s: float = 0.0
    moe_batches: int = 0


class AttentionEngine:
    """``step`` in one thread; the rest in any, in force when the next step is formed."""

    def __init__(
        self, name: str, limits: SchedulerLimits, blocks: BlockPool, runner: StepRunner, spans: SpanLog, tell: Tell
    ) -> None:
        """``tell`` gets the events, each once and in order."""
        self.name = name
        self._runner = runner
        self._blocks = blocks
        self._scheduler = Scheduler(limits, blocks)
        self._lock = threading.Lock()  # guards the scheduler
        self._observer = ShardObserver(name)
        self._spans = spans
        self._tell = tell
        self._untold: list[TokenEvent] = []
        self._tell_error: Exception | None = None
        self._work = _Work()

    @property
    def idle(self) -> bool:
        """No step is needed."""
        with self._lock:
            return self._scheduler.idle

    @property
    def steps(self) -> int:
        """Steps computed so far."""
        return self._work.steps

    def admit(self, requests: Sequence[GenerationRequest]) -> None:
        """The choices of one request, all or none. Raises AdmissionError."""
        now = Instant.now()
        with self._lock:
            self._scheduler.add_all(requests, now.clock_s)
            for request in requests:
                self._observer.admit(request, now)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED, message: str = "") -> bool:
        """End a request; its blocks are free before the next step is formed. False if there was none."""
        with self._lock:
            return self._scheduler.abort(request_id, reason, message)

    def figures(self) -> EngineFigures:
        """What it does and did."""
        with self._lock:
            scheduler, blocks = self._scheduler, self._blocks
            return EngineFigures(
                running=scheduler.n_running,
                waiting=scheduler.n_waiting,
                kv_bytes=self._runner.kv_bytes,
                kv_block_size=blocks.block_size,
                kv_blocks=blocks.n_blocks,
                kv_blocks_free=blocks.n_free,
                kv_blocks_cached=blocks.n_cached,
                kv_blocks_shared=blocks.n_shared,
                prefix_queried_tokens=scheduler.prefix_queried_tokens,
                prefix_hit_tokens=scheduler.prefix_hit_tokens,
                preemptions=scheduler.n_preempted,
                micro_batches=self._runner.micro_batches,
                **self._work._asdict(),
            )

    def step(self, moe: MoEClient | None) -> None:
        """One step of continuous batching; without work it only tells what ended meanwhile. Without ``moe``, the way to
        the experts, its requests end."""
        began_ns = self._spans.begin_step()
        with self._lock:
            begun = Instant.now()
            plan = self._scheduler.schedule(begun.clock_s)
        self._untold += self._observer.note(plan.events, begun)
        if plan.empty:
            self._tell_untold()
            return
        if began_ns:
            self._spans.end("schedule", began_ns)
        events = self._run(plan, begun, moe)
        if self._tell_error is not None:
            raise self._tell_error
        self._untold += events
        if self.idle:
            self._tell_untold()
        if began_ns:
            chunks = plan.all_chunks
            rows = sum(len(chunk.token_ids) for chunk in chunks)
            about = {"rows": rows, "requests": len(chunks), "micro_batches": self._runner.micro_batches}
            self._spans.end_step(began_ns, number=self._work.steps, **about)

    def _run(self, plan: StepPlan, begun: Instant, moe: MoEClient | None) -> list[TokenEvent]:
        """Compute a step, count it, and put its times and those of its requests where they belong."""
        done = self._work
        span = self._observer.begin_step(plan, begun, done.steps + 1)
        if moe is not None:
            moe.begin_step(span.traceparent if span else "")
        events = self._compute(plan, begun, moe)
        now = Instant.now()
        waited_s, batches = (moe.waited_s, moe.batches) if moe else (0.0, 0)
        self._work = _Work(
            done.steps + 1,
            done.busy_s + now.clock_s - begun.clock_s,
            done.experts_wait_s + waited_s,
            done.moe_batches + batches,
        )
        self._observer.end_step(span, now, events, waited_s)
        return self._observer.note(events, now)

    def _compute(self, plan: StepPlan, begun: Instant, moe: MoEClient | None) -> list[TokenEvent]:
        if moe is None:
            return self._void(plan, moe, FinishReason.UNAVAILABLE, "the attention shard lost its router")
        try:
            tokens, progress = self._runner.run(plan, moe, self._spans, self._tell_aside)
        except MoEUnavailable as error:
            log.warning("a step is void: %s", error, extra=self._about(plan))
            return self._void(plan, moe, FinishReason.UNAVAILABLE, str(error))
        except Exception:
            log.exception("a step is void by an error of the engine", extra=self._about(plan))
            return self._void(plan, moe, FinishReason.ERROR, "the engine failed in this step")
        with self._lock:
            elapsed_s = Instant.now().clock_s - begun.clock_s
            return self._scheduler.update(plan, tokens, elapsed_s=elapsed_s, progress=progress)

    def _void(self, plan: StepPlan, moe: MoEClient | None, reason: FinishReason, message: str) -> list[TokenEvent]:
        if moe is not None:
            moe.abandon()
        self._tell_untold()
        self._runner.logprobs.forget_step()
        with self._lock:
            return self._scheduler.fail(plan, reason, message)

    def _tell_untold(self) -> None:
        """What ended or was drawn goes to the gateways, with its log-probabilities."""
        if not self._untold:
            return
        began_ns = self._spans.begin()
        events, self._untold = self._untold, []
        try:
            events = self._runner.logprobs.complete(events)
        except Exception:
            log.exception("log-probabilities could not be computed")
            events = self._without(self._runner.logprobs.forget_step(), events)
        self._tell(events)
        if began_ns:
            self._spans.end(PUBLISH, began_ns, events=len(events))

    def _without(self, lost: Set[str], events: list[TokenEvent]) -> list[TokenEvent]:
        """Requests whose log-probabilities are lost, for want of memory perhaps, end; others lose nothing."""
        told = []
        for event in events:
            if event.request_id not in lost:
                told.append(event)
            elif event.finish is not None:
                told.append(replace(event, token=None, finish=FinishReason.ERROR, message=_NO_LOGPROBS))
            else:
                self.abort(event.request_id, FinishReason.ERROR, _NO_LOGPROBS)
        return told

    def _tell_aside(self) -> None:
        """The same in the middle of a step: an error of telling is none of the step's, and is raised after it."""
        try:
            self._tell_untold()
        except Exception as error:
            self._tell_error = error

    def _about(self, plan: StepPlan) -> dict[str, Any]:
        """For the log: whose step it was."""
        traces = ",".join(self._observer.trace_ids(plan))
        return fields(requests=len(plan.all_chunks), trace_ids=traces or None)
