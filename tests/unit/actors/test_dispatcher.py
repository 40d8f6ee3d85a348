"""The router's data plane against plain wires: losses, refusals, new maps, late answers, step boundaries."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import Span
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import get_current_span

from actors import batch_spans
from actors.batch_spans import DispatchSpan
from actors.dispatcher import Dispatcher
from actors.frames import Kind, expect_parts
from actors.messages import (
    CPU,
    BatchTimes,
    encode_seconds,
    failure_text,
    tensor_bytes,
    tensor_from,
    times_from,
    traced_parts,
)
from actors.routes import ExpertRoutes
from actors.trace_context import trace_from
from actors.transport.base import Frame, FrameTag, PeerGone, ProtocolError, Wire
from actors.transport.local import local_pair
from placement.expert_map import ExpertMap, replaced, single_replica_map
from tests.span_recorder import PARENT_ID, TRACEPARENT, about, named, parent_id

D, E, K = 4, 6, 3
LAYERS = (1, 2)
SECONDS = defaultdict(lambda: 0.125, a=0.25, b=0.75, c=0.5)
"""What each shard says that it computed."""
MAP = single_replica_map(1, LAYERS, E, ("a", "b", "c"))
TWICE = ExpertMap(
    1, E, {layer: tuple((("a", "b"), ("b", "c"), ("c", "a"))[e % 3] for e in range(E)) for layer in LAYERS}
)


def soon() -> float:
    return time.monotonic() + 10.0


_BENCHES: list[Bench] = []


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Every wire is closed at the end."""
    yield
    close_all()


def close_all() -> None:
    while _BENCHES:
        bench = _BENCHES.pop()
        for wire in (bench.attention, bench.source, *bench.shards.values(), *bench.wires.values()):
            wire.close()


class Bench:
    """A dispatcher, an attention shard, and expert shards by name, all in this thread."""

    def __init__(self, expert_map: ExpertMap, timeout_s: float = 10.0) -> None:
        self.data = Dispatcher("router", torch.float32, CPU, D, LAYERS[-1], timeout_s, self.drop)
        _BENCHES.append(self)
        self.attention, self.source = local_pair("attention", "router")
        self.shards: dict[str, Wire] = {}
        self.wires: dict[str, Wire] = {}
        self.times = BatchTimes(0.0, 0.0)  # that came with the last rows
        self.traces: list[int | None] = []  # span ids that came with what was answered
        self.install(expert_map)

    def install(self, expert_map: ExpertMap) -> None:
        for name in expert_map.shards:
            if name not in self.wires:
                self.wires[name], self.shards[name] = local_pair("router", name)
        self.data.install(ExpertRoutes(expert_map, {name: self.wires[name] for name in expert_map.shards}))

    def drop(self, wire: Wire, error: PeerGone) -> None:
        """As the loop does: close it, and tell."""
        wire.close()
        if wire is self.source:
            self.data.lose_source(wire)
        else:
            self.data.lose_shard(wire.peer)

    def kill(self, name: str, notice: bool = True) -> None:
        """A shard dies; without ``notice`` the next send finds out."""
        self.shards[name].close()
        if notice:
            self.drop(self.wires[name], PeerGone("killed"))

    def ask(
        self, step: int = 1, layer: int = 1, rows: int = 5, seed: int = 0, traced: bool = False, micro_batch: int = 0
    ) -> torch.Tensor:
        """One batch; returns what must come back: each row times the weighted sum of (expert + 1)."""
        generator = torch.Generator().manual_seed(seed)
        given = torch.randn(rows, D, generator=generator)
        chosen = torch.rand(rows, E, generator=generator).argsort(1)[:, :K].contiguous()
        weight = torch.rand(rows, K, generator=generator)
        span = DispatchSpan("router", trace_from(TRACEPARENT), layer, rows, 1) if traced else None
        self.data.dispatch(self.source, FrameTag(0, step, micro_batch, layer), given, chosen, weight, span)
        return (given[:, None] * (chosen + 1)[..., None] * weight[..., None]).sum(1)

    def frame(self, name: str) -> Frame | None:
        """What a shard was sent, if anything is there."""
        return self.shards[name].recv(soon()) if self.shards[name].ready() else None

    def answer(self, name: str, frame: Frame, kind: Kind = Kind.RESULTS) -> None:
        """A shard computes (row times expert + 1), or refuses; the router takes it in."""
        (rows, pair_row, pair_expert), trace = traced_parts(frame, 3)
        self.traces.append(None if trace is None else get_current_span(trace).get_span_context().span_id)
        pairs = torch.from_numpy(np.frombuffer(pair_row, np.int32).copy()).long()
        experts = torch.from_numpy(np.frombuffer(pair_expert, np.int32).copy())
        out = tensor_from(rows, torch.float32, D)[pairs] * (experts + 1)[:, None]
        parts = [tensor_bytes(out), encode_seconds(SECONDS[name])] if kind == Kind.RESULTS else [b"no memory"]
        self.shards[name].send(kind, frame.tag, parts, soon())
        self.take(name)

    def take(self, name: str) -> None:
        if self.wires[name].ready():
            self.data.on_results(self.wires[name], self.wires[name].recv(soon()))

    def answer_all(self) -> None:
        """Every live shard answers everything, until nobody has anything left."""
        busy = True
        while busy:
            busy = False
            for name in list(self.shards):
                try:
                    frame = self.frame(name)
                except PeerGone:
                    continue
                if frame is not None:
                    self.answer(name, frame)
                    busy = True

    def result(self) -> torch.Tensor | str:
        """What the attention shard got: rows, or the text of a failure."""
        assert self.attention.ready()
        frame = self.attention.recv(soon())
        if frame.kind == Kind.FAILED:
            return failure_text(frame)
        assert frame.kind == Kind.ROWS_DONE
        rows, times = expect_parts(frame, 2)
        self.times = times_from(times)
        return tensor_from(rows, torch.float32, D).clone()

    @property
    def boundary(self) -> bool:
        return self.data.may_switch(time.monotonic())


def check(bench: Bench, wanted: torch.Tensor) -> None:
    got = bench.result()
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, wanted)
    assert bench.data.next_deadline == float("inf")


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_batch_comes_back_combined(rows: int) -> None:
    bench = Bench(MAP)
    wanted = bench.ask(rows=rows)
    bench.answer_all()
    check(bench, wanted)
    assert bench.data.reroutes == 0
    assert bench.data.expert_rows[1].sum() == rows * K


@pytest.mark.parametrize("notice", [True, False])
def test_a_lost_replica_is_replaced_by_another_at_once(notice: bool) -> None:
    bench = Bench(TWICE)
    if not notice:
        bench.kill("b", notice=False)
    wanted = bench.ask()
    if notice:
        bench.kill("b")
    bench.answer_all()
    check(bench, wanted)
    assert bench.data.reroutes >= 1


def test_without_a_replica_the_batch_waits_for_the_next_map() -> None:
    bench = Bench(MAP)
    wanted = bench.ask()
    assert not bench.boundary
    bench.kill("b")
    bench.answer_all()
    assert not bench.attention.ready()
    assert bench.boundary  # in the middle of a step: nothing else can end the wait
    bench.install(replaced(MAP, "b", "d", 2))
    bench.answer_all()
    check(bench, wanted)


def test_a_replacement_that_dies_as_well_costs_nothing_either() -> None:
    bench = Bench(MAP)
    wanted = bench.ask()
    bench.kill("b")
    bench.install(replaced(MAP, "b", "d", 2))
    bench.kill("d")
    bench.install(replaced(MAP, "b", "e", 3))
    bench.answer_all()
    check(bench, wanted)


def test_answers_of_an_older_map_are_not_taken_twice() -> None:
    """a answers only after the new map had everything sent again: the first answer is stale, the second counts."""
    bench = Bench(MAP)
    wanted = bench.ask()
    first = bench.frame("a")
    assert first is not None
    stale = [bytes(D * 4 * len(expect_parts(first, 3)[1]) // 4), encode_seconds(0.0)]
    bench.shards["a"].send(Kind.RESULTS, first.tag, stale, soon())
    bench.kill("b")
    bench.install(replaced(MAP, "b", "d", 2))
    assert not bench.wires["a"].ready()
    bench.answer_all()
    check(bench, wanted)


def test_a_refusal_goes_to_another_replica_and_without_one_fails_the_batch() -> None:
    bench = Bench(TWICE)
    wanted = bench.ask()
    frame = bench.frame("c")
    assert frame is not None
    bench.answer("c", frame, Kind.FAILED)
    bench.answer_all()
    check(bench, wanted)
    alone = Bench(MAP)
    alone.ask()
    frame = alone.frame("c")
    assert frame is not None
    alone.answer("c", frame, Kind.FAILED)
    assert alone.result() == "no memory"
    alone.answer_all()
    assert not alone.attention.ready()
    assert alone.boundary


def test_the_deadline_names_who_is_late_and_who_is_lost() -> None:
    bench = Bench(MAP)
    bench.ask()
    bench.kill("b")
    bench.data.end_late(time.monotonic() + 5)
    assert not bench.attention.ready()
    bench.data.end_late(time.monotonic() + 11)
    assert bench.result() == "no answer within 10 s from a, c; lost: b"
    bench.answer_all()
    assert not bench.attention.ready()


def test_steps_end_with_their_last_layer_or_a_failure_or_their_source() -> None:
    bench = Bench(MAP)
    assert bench.boundary
    bench.ask(layer=1)
    bench.answer_all()
    assert not bench.boundary
    bench.ask(layer=2)
    assert not bench.boundary
    bench.answer_all()
    assert bench.boundary
    bench.ask(step=2, layer=1)
    bench.drop(bench.source, PeerGone("gone"))
    assert bench.boundary
    assert bench.data.next_deadline == float("inf")


def test_a_new_step_forgets_the_batches_of_the_one_before() -> None:
    bench = Bench(MAP)
    bench.ask(step=1)
    bench.kill("b")
    wanted = bench.ask(step=2, seed=1)
    bench.install(replaced(MAP, "b", "d", 2))
    bench.answer_all()
    check(bench, wanted)
    assert not bench.attention.ready()


def test_a_split_step_ends_with_its_last_micro_batch_in_the_last_layer() -> None:
    """However long nothing of it is in flight: between the micro-batches no other map is put in force."""
    bench = Bench(MAP)
    for layer in LAYERS:
        for micro_batch in (2, 1, 0):
            wanted = bench.ask(layer=layer, micro_batch=micro_batch, seed=micro_batch)
            bench.answer_all()
            check(bench, wanted)
            assert bench.boundary == (layer == LAYERS[-1] and micro_batch == 0)


def test_the_boundary_waits_for_all_micro_batches_in_flight() -> None:
    bench = Bench(MAP)
    wanted = [bench.ask(layer=LAYERS[-1], micro_batch=n, seed=n) for n in (1, 0)]
    for rows in wanted:
        assert not bench.boundary
        for name in bench.shards:
            frame = bench.frame(name)
            assert frame is not None
            bench.answer(name, frame)
        got = bench.result()
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, rows)
    assert bench.boundary


def test_a_step_whose_source_stops_in_the_middle_is_forgotten() -> None:
    bench = Bench(MAP)
    wanted = bench.ask(layer=LAYERS[-1], micro_batch=1)
    bench.answer_all()
    check(bench, wanted)
    assert not bench.boundary
    assert bench.data.may_switch(time.monotonic() + 11)


def test_a_failed_micro_batch_takes_its_step_with_it() -> None:
    """What is in flight of it, and what still comes: none is answered, and none is in the way of the next map."""
    bench = Bench(MAP)
    bench.ask(micro_batch=2)
    bench.ask(micro_batch=1)
    frame = bench.frame("c")
    assert frame is not None
    bench.answer("c", frame, Kind.FAILED)
    assert bench.result() == "no memory"
    bench.ask(micro_batch=0)
    assert bench.boundary
    assert bench.data.next_deadline == float("inf")
    bench.answer_all()
    assert not bench.attention.ready()
    wanted = bench.ask(step=2)
    bench.answer_all()
    check(bench, wanted)


def test_micro_batches_that_are_late_are_one_failure() -> None:
    bench = Bench(MAP)
    for micro_batch in (1, 0):
        bench.ask(micro_batch=micro_batch)
    bench.data.end_late(time.monotonic() + 11)
    assert isinstance(bench.result(), str)
    assert not bench.attention.ready()
    assert bench.boundary


def test_a_batch_of_a_void_step_ends_its_span(spans: InMemorySpanExporter) -> None:
    bench = Bench(MAP)
    bench.ask(micro_batch=1)
    bench.data.end_late(time.monotonic() + 11)
    bench.ask(micro_batch=0, traced=True)
    (span,) = named(spans, "dispatch")
    assert span.attributes["error.type"] == "abandoned"


def test_micro_batches_are_sent_again_when_a_shard_dies() -> None:
    bench = Bench(TWICE)
    wanted = {n: bench.ask(micro_batch=n, seed=n) for n in (2, 1, 0)}
    bench.kill("b")
    bench.answer_all()
    for _ in range(3):
        frame = bench.attention.recv(soon())
        torch.testing.assert_close(tensor_from(frame.parts[0], torch.float32, D), wanted.pop(frame.tag.micro_batch))
    assert bench.data.reroutes >= 1


def test_answers_say_how_long_the_slowest_shard_computed_and_how_long_the_router_had_them() -> None:
    bench = Bench(MAP)
    wanted = bench.ask(rows=7)
    bench.answer_all()
    check(bench, wanted)
    assert bench.times.experts_s == SECONDS["b"]
    done = bench.data.completed
    assert bench.times.router_s == pytest.approx(done.dispatch_s + done.combine_s)


def test_results_without_their_time_are_no_results() -> None:
    bench = Bench(MAP)
    bench.ask()
    frame = bench.frame("a")
    assert frame is not None
    bench.shards["a"].send(Kind.RESULTS, frame.tag, [b""], soon())
    with pytest.raises(ProtocolError, match="has 1 parts, expected 2"):
        bench.take("a")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["kill", "map", "answer", "ask"]), st.integers(0, 2)), max_size=25))
def test_whatever_happens_each_batch_is_answered_once_and_right(events: list[tuple[str, int]]) -> None:
    """Random losses, maps and answers; at the end every shard lives, and the last batch comes back right."""
    close_all()
    bench, current = Bench(MAP), MAP
    wanted, step, newest = bench.ask(), 1, 0
    answered = 0
    for event, number in events:
        name = current.shards[number]
        if event == "kill" and name not in bench.data.routes.lost:
            bench.kill(name)
        elif event == "map":
            newest += 1
            current = replaced(current, name, f"n{newest}", current.epoch + 1)
            for other in sorted(bench.data.routes.lost - {name}):
                newest += 1
                current = replaced(current, other, f"n{newest}", current.epoch)
            bench.install(current)
        elif event == "answer" and name not in bench.data.routes.lost and (frame := bench.frame(name)):
            bench.answer(name, frame)
        elif event == "ask" and bench.attention.ready():
            check(bench, wanted)
            answered, step = answered + 1, step + 1
            wanted = bench.ask(step=step, seed=step, layer=1 + step % 2)
    for lost in sorted(bench.data.routes.lost):
        newest += 1
        current = replaced(current, lost, f"n{newest}", current.epoch + 1)
    bench.install(current)
    bench.answer_all()
    check(bench, wanted)
    assert not bench.attention.ready()


def test_results_stay_until_their_batch_is_complete_however_many_come_meanwhile() -> None:
    """One shard answers three micro-batches before any other answers one."""
    bench = Bench(MAP)
    wanted = {n: bench.ask(micro_batch=n, seed=n) for n in (2, 1, 0)}
    for name in bench.shards:
        for _ in range(3):
            frame = bench.frame(name)
            assert frame is not None
            bench.answer(name, frame)
    for n in (2, 1, 0):
        got = bench.result()
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, wanted[n])


def send_rows(bench: Bench, given: torch.Tensor, step: int, micro_batch: int) -> torch.Tensor:
    """As ``ask``, but the rows come in a frame, where they are left. All go to the experts 0 to K - 1."""
    bench.attention.send(Kind.ROWS, FrameTag(0, step, micro_batch, 1), [tensor_bytes(given)], soon())
    frame = bench.source.recv(soon())
    chosen, weight = torch.arange(K).expand(len(given), K).contiguous(), torch.ones(len(given), K)
    bench.data.dispatch(bench.source, frame.tag, tensor_from(frame.parts[0], torch.float32, D), chosen, weight)
    return (given[:, None] * (chosen + 1)[..., None]).sum(1)


def test_rows_are_sent_again_from_the_frame_that_they_came_in() -> None:
    """Later frames of the same wire leave it alone."""
    bench = Bench(TWICE)
    wanted = {n: send_rows(bench, torch.full((2, D), n + 1.0), 1, n) for n in (2, 1, 0)}
    bench.kill("b")
    bench.answer_all()
    for _ in range(3):
        frame = bench.attention.recv(soon())
        torch.testing.assert_close(tensor_from(frame.parts[0], torch.float32, D), wanted.pop(frame.tag.micro_batch))
    assert bench.data.reroutes >= 1


def test_batches_let_go_of_their_frames() -> None:
    """Completed, given up, failed, or forgotten."""
    bench, allocations = Bench(MAP), []
    for step in range(1, 25):
        send_rows(bench, torch.ones(2, D), step, 0)
        frame = bench.frame("a")
        assert frame is not None
        bench.answer("a", frame, Kind.FAILED if step % 4 == 1 else Kind.RESULTS)
        if step % 4 == 2:
            bench.data.end_late(time.monotonic() + 11)
        elif step % 4 == 3:
            bench.answer_all()
        while bench.attention.ready():
            bench.attention.recv(soon())
        for name in ("b", "c"):
            while bench.frame(name):
                pass
        pools = [wire._pool for wire in (bench.source, *bench.wires.values())]  # type: ignore[attr-defined]
        allocations.append(sum(pool.allocations for pool in pools))
    assert allocations[-1] == allocations[7]


class Group:
    """As much of a group as is looked at: it counts its batches."""

    failure: str | None = None

    def __init__(self) -> None:
        self.batches = 0

    @contextmanager
    def batch(self) -> Iterator[None]:
        self.batches += 1
        yield


def test_over_a_group_a_step_boundary_waits_for_answers_that_nobody_needs_any_more() -> None:
    """A shard whose results are not taken could send no others."""
    bench = Bench(MAP)
    group = Group()
    assert bench.data.routes is not None
    bench.data.routes.group = group  # type: ignore[assignment]
    bench.ask(step=1, layer=LAYERS[-1])
    late = {name: frame.tag for name in bench.shards if (frame := bench.frame(name))}
    wanted = bench.ask(step=2, layer=LAYERS[-1])
    bench.answer_all()
    check(bench, wanted)
    assert group.batches == 2
    for name, tag in late.items():
        assert not bench.boundary
        bench.shards[name].send(Kind.RESULTS, tag, [b""], soon())
        bench.take(name)
    assert bench.boundary


def test_completed_batches_are_counted_and_timed() -> None:
    bench = Bench(MAP)
    for step in (1, 2):
        wanted = bench.ask(step=step)
        bench.answer_all()
        check(bench, wanted)
    assert bench.data.completed.batches == 2
    assert 0 < bench.data.longest_wait_s < bench.data.completed.dispatch_s < 2 * bench.data.longest_wait_s
    assert bench.data.completed.combine_s > 0
    bench.ask(step=3)
    bench.data.end_late(time.monotonic() + 11)
    assert bench.data.completed.batches == 2


def test_what_is_sent_again_carries_the_trace_of_its_batch(spans: InMemorySpanExporter) -> None:
    """A shard dies and the next map replaces it: every frame names the router's span, and that one tells it all."""
    bench = Bench(MAP)
    wanted = bench.ask(traced=True)
    first = bench.frame("a")
    assert first is not None
    bench.answer("a", first)
    bench.kill("b")
    bench.install(replaced(MAP, "b", "d", 2))
    bench.answer_all()
    check(bench, wanted)
    (span,) = named(spans, "dispatch")
    assert parent_id(span) == PARENT_ID
    assert set(bench.traces) == {span.context.span_id}
    figures = {key: about(span, key) for key in ("actor", "layer", "rows", "shards", "epoch", "reroutes")}
    assert figures == {"actor": "router", "layer": 1, "rows": 5, "shards": 4, "epoch": 2, "reroutes": 2}
    assert bench.data.reroutes == 2  # when it died, and by the new map
    bench.ask(step=2)
    bench.answer_all()
    assert bench.traces[-1] is None
    assert len(spans.get_finished_spans()) == 1


def test_a_batch_that_is_given_up_ends_its_span(spans: InMemorySpanExporter) -> None:
    bench = Bench(MAP)
    bench.ask(step=1, traced=True)
    bench.ask(step=2, traced=True)
    bench.data.end_late(time.monotonic() + 11)
    bench.ask(step=3, traced=True)
    bench.drop(bench.source, PeerGone("gone"))
    kinds = [span.attributes["error.type"] for span in spans.get_finished_spans()]
    assert kinds == ["abandoned", "failed", "abandoned"]


def test_who_reads_the_counters_sees_whole_batches() -> None:
    bench = Bench(MAP)
    before = bench.data.completed
    wanted = bench.ask()
    assert bench.data.completed is before
    bench.answer_all()
    check(bench, wanted)
    assert before == (0, 0.0, 0.0)
    assert (bench.data.completed.batches, bench.data.completed.dispatch_s > 0) == (1, True)


@pytest.mark.parametrize("what", ["start_span", "end"])
def test_a_span_that_fails_costs_no_batch(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    broken = Mock(side_effect=KeyError("broken"))
    if what == "start_span":
        monkeypatch.setattr(batch_spans, "_TRACER", Mock(start_span=broken))
    else:
        monkeypatch.setattr(Span, "end", broken)
    bench = Bench(MAP)
    wanted = bench.ask(traced=True)
    bench.answer_all()
    check(bench, wanted)
    assert broken.called
    assert (None in bench.traces) == (what == "start_span"), "without a span there is no trace to go on with"
