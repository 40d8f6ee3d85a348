"""A seeded storm over the scheduler: arrivals, aborts, deadlines, failures, crashes, and too few blocks.

The fake model derives each token from all tokens before it, as read back from a fake cache through the block table,
so a token lost, repeated, or put into a wrong slot changes what follows and shows against the request's lone run. The
cache forgets a block as soon as nobody can find it, and knows for whom a block was computed. A referee watches whose
turn it is.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from actors.engine.plan import Chunk, Progress, StepPlan, drawing
from actors.engine.request import FinishReason, GenerationRequest, Priority, TokenEvent
from actors.engine.scheduler import DuplicateRequest, NeverFits, QueueFull, Scheduler

from .builders import VOCABULARY, FakeCache, lone_run, make_request, make_scheduler
from .referee import Referee

CUT_SHORT = {FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.UNAVAILABLE, FinishReason.ERROR}
_SLOWEST = 3  # steps that a piece may take
SHARES = {"a": 1.0, "b": 2.0, "c": 0.5}


class Storm:
    """Drives one scheduler, and after each crash a new one, with random events; checks after each what was promised."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        block_size = rng.randint(1, 5)
        self.settings = {
            "n_blocks": 30 // block_size + rng.randint(1, 9),
            "block_size": block_size,
            "context_length": rng.choice([24, 40, 40, 64]),
            "max_running": rng.randint(1, 8),
            "token_budget": rng.randint(8, 30),
            "max_waiting": rng.randint(1, 12),
            "prefix_cache": rng.random() < 0.8,
            "batch_patience_s": rng.choice([5.0, 60.0]),
            "layers": rng.choice([1, 5]),
        }
        self.timed = rng.random() < 0.5
        self.remeasure = rng.choice([1, 3, 20, 256])
        # Long prompts beside one stream, in a pool that holds hardly both, while decodes are measured all the time.
        if seed % 5 == 2:
            cramped = {"n_blocks": 56 // block_size, "context_length": 64, "max_running": rng.randint(2, 3)}
            self.settings |= cramped | {"prefix_cache": False}
            self.timed, self.remeasure = True, rng.randint(1, 3)
        # Of one tenant and class, without faults of its own: then arrivals are served strictly in turn.
        self.plain = seed % 5 == 0
        # Tenants that nearly always wait, for little room, with one answer each: then shares decide, and nothing else.
        self.contested = seed % 5 == 1
        self.choices = [1] if self.contested else [1] * 6 + [2, 4]
        if self.contested:
            self.settings |= {"max_running": rng.randint(1, 2), "max_waiting": 12, "prefix_cache": False}
        self.bases = [tuple(rng.randrange(VOCABULARY) for _ in range(24)) for _ in range(3)]
        self.now = 0.0
        self.n_steps = 0
        self.counts: Counter[str] = Counter()
        self.admitted: dict[str, GenerationRequest] = {}
        self.owners: dict[str, object] = {}
        self.bad_from: dict[str, int] = {}
        self.deadlines: dict[str, float] = {}
        self.told: dict[str, list[TokenEvent]] = defaultdict(list)
        self.may_end: dict[str, set[FinishReason]] = defaultdict(set)
        self.open: dict[str, int] = {}  # live requests: the step by which each has to end, where that is promised
        self.n_still = 0
        self.n_slow = 0  # steps since a piece was finished
        self.n_names = 0
        self.new_engine()

    def new_engine(self) -> None:
        self.scheduler: Scheduler = make_scheduler(**self.settings)  # type: ignore[arg-type]
        self.scheduler._gap_bound._REMEASURE = self.remeasure
        self.cache = FakeCache(self.scheduler.blocks, self.owners, self.bad_from)
        self.referee = Referee(self.scheduler, max(self.choices))

    # -- what comes -------------------------------------------------------------------------------------------------

    def arrivals(self) -> None:
        """Bursts and lulls; where tenants contest, one of them is away for a while, and the others keep waiting."""
        rate = 0.4 if self.n_steps // 200 % 2 == 0 else 0.1
        while self.rng.random() < rate:
            self.arrive(self.rng.choice(list(SHARES)))
        if self.contested:
            waiting = Counter(sequence.request.tenant for sequence in self.scheduler._lineup.waiting)
            away = list(SHARES)[self.n_steps // 150 % 4 - 1] if self.n_steps // 150 % 4 else ""
            for tenant in SHARES:
                if tenant != away and waiting[tenant] < 2:
                    self.arrive(tenant)

    def arrive(self, tenant: str) -> None:
        rng = self.rng
        requests = self.new_requests("a" if self.plain else tenant)
        for request in requests:
            self.owners[request.request_id] = (request.tenant, request.adapter)
            if rng.random() < 0.03:
                self.bad_from[request.request_id] = rng.randrange(30)
        try:
            self.scheduler.add_all(requests, self.now)
        except NeverFits:
            self.counts["never fits"] += 1
            return
        except QueueFull as refusal:
            self.counts["queue full"] += 1
            self.counts["over its share"] += refusal.tenant_limit is not None
            assert self.scheduler.n_waiting + len(requests) > self.scheduler.limits.max_waiting
            return
        self.counts["arrival"] += len(requests)
        for request in requests:
            self.note_admitted(request)
        self.referee.seen()
        with pytest.raises(DuplicateRequest):
            self.scheduler.add_all(requests[-1:], self.now)

    def new_requests(self, tenant: str) -> list[GenerationRequest]:
        """One request, or the choices of one; or strangers, who name a leader that is none for them."""
        rng = self.rng
        base = rng.choice(self.bases)
        prompt = base[: rng.choice([0, 7, 8, 16, 24])] + tuple(
            rng.randrange(VOCABULARY) for _ in range(rng.choice([rng.randint(0, 9)] * 4 + [rng.randint(10, 36)]))
        )
        request = make_request(
            f"r{self.n_names}",
            prompt,
            max_tokens=rng.randint(0, 25) if rng.random() < 0.2 else rng.randint(1, 14),
            stop_ids=frozenset(rng.sample(range(VOCABULARY), rng.choice([0, 0, 3]))),
            timeout_s=rng.choice([None, None, None, rng.uniform(-1, 60)]),
            tenant=tenant,
            share=SHARES[tenant],
            adapter=rng.choice(["", "", "", "x"]),
            priority=Priority.BATCH if not self.plain and rng.random() < 0.4 else Priority.INTERACTIVE,
            prompt_logprobs=rng.choice([None] * 6 + [0, 5]),
        )
        self.n_names += 1
        if rng.random() < 0.1 and prompt:  # from a lost shard, with tokens that were generated there
            generated = tuple(e.token for e in lone_run(replace(request, max_tokens=3), 99) if e.token is not None)
            request = replace(request, generated_ids=generated)
        n = rng.choice(self.choices)
        self.counts["followers"] += n - 1
        names = [f"{request.request_id}-{i}" for i in range(1, n)]
        return [request, *(self.stranger(replace(request, request_id=n, leader=request.request_id)) for n in names)]

    def stranger(self, follower: GenerationRequest) -> GenerationRequest:
        """The follower, now and then with something that its leader has not."""
        rng = self.rng
        if rng.random() > 0.2 or len(follower.prompt_ids) < 2:
            return follower
        self.counts["stranger"] += 1
        others: list[dict[str, Any]] = [{"prompt_ids": (*follower.prompt_ids[:-1], rng.randrange(VOCABULARY))}]
        if not self.plain:
            tenant = rng.choice(list(SHARES))
            others += [{"tenant": tenant, "share": SHARES[tenant]}, {"priority": rng.choice(list(Priority))}]
        return replace(follower, generated_ids=(), **rng.choice(others))

    def note_admitted(self, request: GenerationRequest) -> None:
        name = request.request_id
        self.admitted[name] = request
        # Those before it one after the other, each perhaps computed twice.
        before = len(self.open) + 1
        self.open[name] = self.n_steps + 2 * self.scheduler.limits.context_length * before
        if request.timeout_s is not None:
            self.deadlines[name] = self.now + request.timeout_s
            if request.timeout_s <= 0:
                self.may_end[name].add(FinishReason.DEADLINE)

    def maybe_abort(self) -> None:
        if self.rng.random() > 0.04 or not self.open:
            return
        name = self.rng.choice(list(self.open))
        if self.scheduler.abort(name):
            self.counts["abort"] += 1
            self.may_end[name].add(FinishReason.CANCELLED)
            self.referee.seen()
        assert not self.scheduler.abort(name)

    def maybe_go_bad(self, plan: StepPlan) -> None:
        """Rows of a prefill are not finite from this piece on; that shows when a token is drawn."""
        for chunk in plan.all_chunks:
            if chunk.draw is None and self.rng.random() < 0.02:
                self.counts["went bad"] += 1
                self.bad_from.setdefault(chunk.request_id, chunk.start)

    def crash(self) -> None:
        """The engine is lost with all it had; who waits for it asks another one, with the tokens that it has."""
        self.counts["crash"] += 1
        self.new_engine()
        names = list(self.open)
        self.rng.shuffle(names)
        for name in names:
            request, told = self.admitted[name], self.told[name]
            left = self.deadlines[name] - self.now if name in self.deadlines else None
            if left is not None and left <= 0:
                self.may_end[name].add(FinishReason.DEADLINE)
            has = (*request.generated_ids, *(event.token for event in told if event.token is not None))
            self.scheduler.add(replace(request, generated_ids=has, replay=True, timeout_s=left), self.now)
            self.referee.seen()
            self.open[name] = self.n_steps + 2 * self.scheduler.limits.context_length * len(names)

    # -- a step -----------------------------------------------------------------------------------------------------

    def step(self, disturbed: bool) -> None:
        self.now += self.rng.uniform(0, 2)
        self.n_steps += 1
        late = {name for name in self.open if self.deadlines.get(name, self.now + 1) <= self.now}
        for name in late:
            self.may_end[name].add(FinishReason.DEADLINE)
        before = self.scheduler.n_preempted, self.scheduler.prefix_hit_tokens, self.scheduler.blocks.n_evicted
        self.referee.before()
        plan = self.scheduler.schedule(self.now)
        self.referee.planned(plan, self.now)
        self.counts["step"] += 1
        self.counts["preemption"] += self.scheduler.n_preempted - before[0]
        self.counts["hit tokens"] += self.scheduler.prefix_hit_tokens - before[1]
        self.counts["eviction"] += self.scheduler.blocks.n_evicted - before[2]
        self.counts["copy"] += len(plan.copies)
        self.publish(plan.events)
        assert not late & self.open.keys()
        self.check_plan(plan)
        if disturbed:
            self.maybe_abort()
            self.maybe_go_bad(plan)
            self.arrivals()
        tokens = self.cache.run_chunks(plan)
        self.resolve(plan, tokens, self.progress(plan), self.rng.random() if disturbed else 1.0)
        self.check_state()

    def progress(self, plan: StepPlan) -> Progress:
        """By chance, but in every few steps that may compute something of them a piece is finished."""
        if not plan.pieces or (plan.pace is not None and not plan.pace.limit_s):
            return Progress()
        finished = len(plan.pieces)
        if plan.pace is not None:
            finished = self.rng.randrange(self.n_slow == _SLOWEST, finished + 1)
        self.n_slow = 0 if finished else self.n_slow + 1
        self.counts["piece"] += finished
        self.counts["piece on its way"] += finished < len(plan.pieces)
        return self.cache.advance(plan, finished, pass_early=self.rng.random() < 0.5)

    def check_plan(self, plan: StepPlan) -> None:
        limits, lineup, blocks = self.scheduler.limits, self.scheduler._lineup, self.scheduler.blocks
        chunks = plan.all_chunks
        assert sum(len(chunk.token_ids) for chunk in chunks) <= limits.token_budget
        assert len({(chunk.request_id, chunk.start) for chunk in chunks}) == len(chunks)
        assert len({chunk.request_id for chunk in plan.chunks}) == len(plan.chunks)
        slots = [slot for chunk in chunks for slot in chunk.slots]
        assert len(set(slots)) == len(slots)
        assert all(blocks.writable(slot // blocks.block_size) for slot in slots)
        for chunk in chunks:
            self.check_prompt_targets(chunk)
        # Nobody starves: the first of the running ones moves, but for a step in which decodes alone are measured, and
        # those in which pieces of others are under way that began before it.
        moving = {chunk.request_id for chunk in (chunks if plan.pace is None or plan.pace.limit_s else plan.chunks)}
        first = lineup.running[0].request.request_id if lineup.running else None
        self.n_still = 0 if first in moving or not self.open else self.n_still + 1
        assert self.n_still <= (limits.max_running.bit_length() + 2 * (_SLOWEST + 1) if self.timed else 0)
        assert not self.open or moving

    def check_prompt_targets(self, chunk: Chunk) -> None:
        name = chunk.request_id
        request = self.admitted[name]
        wanted = request.prompt_logprobs is not None and not request.generated_ids and not self.told[name]
        end = chunk.start + len(chunk.token_ids)
        assert chunk.prompt_targets == (request.prompt_ids[chunk.start + 1 : end + 1] if wanted else ())
        assert chunk.prompt_logprobs == (request.prompt_logprobs if wanted else 0)

    def resolve(self, plan: StepPlan, tokens: list[int | None], progress: Progress, luck: float) -> None:
        names = [chunk.request_id for chunk in plan.all_chunks]
        if luck < 0.01:
            self.counts["failed step"] += 1
            self.n_still = 0
            for name in names:
                self.may_end[name].add(FinishReason.UNAVAILABLE)
            self.tell(self.scheduler.fail(plan, FinishReason.UNAVAILABLE, "no expert"))
            assert not self.open.keys() & set(names)
            return
        failures: dict[str, str] = {}
        if names and luck < 0.03:
            self.counts["failed chunk"] += 1
            failures[self.rng.choice(names)] = "not finite"
            for chunk in plan.all_chunks:
                if chunk.request_id in failures:
                    for slot in chunk.slots:
                        self.cache.slots[slot] = FakeCache.POISON
        drawn = [*zip(plan.sampled, tokens, strict=True)]
        for piece, of_piece in zip(plan.pieces, progress.finished, strict=False):
            drawn += zip(drawing(piece.chunks), of_piece, strict=True)
        lost = {chunk.request_id for chunk, token in drawn if token is None}
        self.counts["no token"] += len(lost)
        for name in lost | failures.keys():
            self.may_end[name].add(FinishReason.ERROR)
        elapsed_s = self.rng.choice([self.rng.uniform(0.5, 2.0)] * 9 + [0.0, math.nan]) if self.timed else None
        if elapsed_s is not None and math.isnan(elapsed_s):
            self.n_still = 0  # nothing was measured: prefills may be left out once more
        self.tell(self.scheduler.update(plan, tokens, failures, elapsed_s, progress))
        assert not self.open.keys() & (lost | failures.keys())

    def tell(self, events: list[TokenEvent]) -> None:
        """What a step that is over has brought."""
        self.referee.told(events)
        self.publish(events)

    def publish(self, events: Iterable[TokenEvent]) -> None:
        """Each request's tokens once, in order, and one end."""
        for event in events:
            name = event.request_id
            request, told = self.admitted[name], self.told[name]
            assert name in self.open
            assert event.index == len(request.generated_ids) + len(told)
            assert (event.token is not None) != (event.finish in CUT_SHORT)
            if self.plain:
                assert self.n_steps <= self.open[name]
            self.counts["cached"] += event.cached > 0
            told.append(replace(event, cached=0))
            if event.finish is not None:
                del self.open[name]

    def check_state(self) -> None:
        self.scheduler.check()
        in_engine = [sequence.request.request_id for sequence in self.scheduler._lineup]
        assert sorted(in_engine) == sorted(
            name for name in self.open if FinishReason.CANCELLED not in self.may_end[name]
        )
        # A model must never read what was in memory before, unless it can be found.
        blocks = self.scheduler.blocks
        self.cache.poison_all_but(b for b in range(blocks.n_blocks) if blocks.n_holders(b) or b in blocks._cached)

    def run(self, n_events: int) -> None:
        while self.counts["step"] + self.counts["arrival"] + self.counts["abort"] < n_events:
            self.arrivals()
            self.maybe_abort()
            self.step(disturbed=True)
            if self.rng.random() < 0.002:
                self.crash()
        for _ in range(1 + 2 * self.scheduler.limits.context_length * len(self.open)):
            if self.scheduler.idle:
                break
            self.step(disturbed=False)
        assert self.scheduler.idle
        assert not self.open
        assert self.scheduler.blocks.n_free == self.scheduler.blocks.n_blocks
        self.check_ends()

    def check_ends(self) -> None:
        assert self.told.keys() == self.admitted.keys()
        for name, told in self.told.items():
            lone = lone_run(self.admitted[name], self.scheduler.limits.context_length)
            if told[-1].finish in CUT_SHORT:
                assert told[-1].finish in self.may_end[name]
                assert told[:-1] == lone[: len(told) - 1]
            else:
                assert told == lone
