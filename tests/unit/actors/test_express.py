"""Frames that the compiled express serves, beside those of the general way: the same bits, counts and losses."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.expert import ExpertShard
from actors.express import router as express_router
from actors.express import shard as express_shard
from actors.frames import Kind, array_bytes
from actors.messages import (
    encode_seconds,
    failure_text,
    indices_from,
    seconds_from,
    tensor_bytes,
    tensor_from,
    traced_parts,
)
from actors.model.families import load_spec
from actors.router import Router
from actors.settings import ModelSettings
from actors.stats import RouterStats
from actors.transport.base import Address, Frame, FrameTag, PeerGone, Wire, WireTimeout
from placement.expert_map import ExpertMap, single_replica_map
from tests.checkpoints import write_deepseek_v3
from tests.shared_memory import shm_endpoint
from tests.span_recorder import TRACEPARENT

PATIENCE_S = 20.0
LAYERS = (1, 2)
EXPERTS, WIDTH = 16, 64
NAMES = ("a", "b", "c")
ALONE = single_replica_map(1, LAYERS, EXPERTS, NAMES)
TWICE = ExpertMap(
    1, EXPERTS, {layer: tuple((("a", "b"), ("b", "c"), ("c", "a"))[e % 3] for e in range(EXPERTS)) for layer in LAYERS}
)


def soon() -> float:
    return time.monotonic() + PATIENCE_S


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v3")
    write_deepseek_v3(folder, seed=1)
    return folder


class Bench:
    """A router over shared memory, between an attention shard and expert shards that are this thread."""

    def __init__(
        self, path: Path, stack: ExitStack, expert_map: ExpertMap, dtype: str, timeout_s: float, ring_bytes: int
    ) -> None:
        self.dtype, self.top_k = getattr(torch, dtype), load_spec(path).moe.top_k
        make = partial(shm_endpoint, ring_bytes=ring_bytes)
        self.router = Router("router", ModelSettings(path, dtype, 0, 1, timeout_s), make)
        stack.callback(self.router.stop)
        address = self.router.load()
        self.shards: dict[str, Wire] = {}
        self._addresses: dict[str, Address] = {}
        self._stack, self._make = stack, make
        self.install(expert_map)
        self.attention = make("attention").connect(address, soon())
        stack.callback(self.attention.close)
        self._sent: dict[FrameTag, Tensor] = {}

    def install(self, expert_map: ExpertMap) -> None:
        self.prepare(expert_map)
        self.router.commit(expert_map.epoch, PATIENCE_S)

    def prepare(self, expert_map: ExpertMap) -> None:
        for name in expert_map.shards:
            if name not in self._addresses:
                listening = self._make(name, partial(self._joined, name))
                self._stack.callback(listening.close)
                self._addresses[name] = listening.address
        self.router.prepare(expert_map, self._addresses, None, PATIENCE_S)

    def _joined(self, name: str, wire: Wire) -> None:
        self.shards[name] = wire
        self._stack.callback(wire.close)

    def send(self, step: int, layer: int, count: int, micro_batch: int = 0, *trace: bytes) -> FrameTag:
        """``count`` rows, always the same for a step."""
        rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(step)).to(self.dtype)
        tag = FrameTag(0, step, micro_batch, layer)
        self.attention.send(Kind.ROWS, tag, [tensor_bytes(rows), *trace], soon())
        return tag

    def asked(self, name: str) -> Frame:
        """What a shard was sent; the frame's parts are copies."""
        frame = self.shards[name].recv(soon())
        return frame._replace(parts=tuple(memoryview(bytearray(part)) for part in frame.parts))

    def asked_all(self, rows: int) -> list[tuple[str, Frame]]:
        """All that shards were sent of so many rows."""
        owed, frames, end = rows * self.top_k, [], soon()
        while owed:
            for name, wire in self.shards.items():
                while wire.ready():
                    frames.append((name, self.asked(name)))
                    owed -= len(frames[-1][1].parts[1]) // 4
            assert time.monotonic() < end
        return frames

    def results(self, frame: Frame) -> list[memoryview | bytes]:
        """Each row times (expert + 1)."""
        (rows, pair_row, pair_expert), _ = traced_parts(frame, 3)
        out = tensor_from(rows, self.dtype, WIDTH)[indices_from(pair_row)] * (indices_from(pair_expert) + 1)[:, None]
        return [tensor_bytes(out.to(self.dtype)), encode_seconds(0.25)]

    def answer(self, name: str) -> None:
        """A shard computes what it was sent."""
        frame = self.asked(name)
        self.shards[name].send(Kind.RESULTS, frame.tag, self.results(frame), soon())

    def answer_all(self) -> Frame:
        """Whoever is asked answers, until the attention shard has an answer."""
        end = soon()
        while not self.attention.ready():
            for name, wire in self.shards.items():
                if wire.ready():
                    self.answer(name)
            assert time.monotonic() < end
        return self.came()

    def came(self) -> Frame:
        frame = self.attention.recv(soon())
        return frame._replace(parts=tuple(memoryview(bytearray(part)) for part in frame.parts))

    def kill(self, name: str) -> None:
        self.shards.pop(name).close()

    def stats(self) -> RouterStats:
        return self.router.stats()

    @property
    def compiled(self) -> int:
        """Batches that were completed without the interpreter."""
        express = self.router._express
        return 0 if express is None else express.completed().batches


Benches = Callable[..., Bench]


@pytest.fixture
def bench(path: Path) -> Iterator[Benches]:
    with ExitStack() as stack:

        def make(
            expert_map: ExpertMap = ALONE,
            dtype: str = "float32",
            timeout_s: float = 5 * PATIENCE_S,  # a wait that ends takes what is under way to the general way
            ring_bytes: int = 1 << 20,
        ) -> Bench:
            return Bench(path, stack, expert_map, dtype, timeout_s, ring_bytes)

        yield make


@contextmanager
def nothing_compiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(express_router, "compiled", lambda model: None)
        patched.setattr(express_shard, "compiled", lambda model: None)
        yield


def sizes(seed: int, count: int, least: int, most: int) -> Sequence[int]:
    return [int(size) for size in np.random.default_rng(seed).integers(least, most, count)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("expert_map", [ALONE, TWICE], ids=["alone", "twice"])
@pytest.mark.parametrize(
    ("ring_bytes", "least", "most"),
    [(1 << 20, 1, 60), (64 << 10, 1, 200), (4 << 20, 1100, 2000)],
    ids=["", "small rings", "frames in several pieces"],
)
def test_batches_have_the_bits_and_the_counts_of_the_general_way(
    bench: Benches, expert_map: ExpertMap, dtype: str, ring_bytes: int, least: int, most: int
) -> None:
    """Small rings: frames go over their ends, and some are too large to be served whole. Others come in pieces, and are
    served when all of them are there."""
    small = ring_bytes < 1 << 20
    ours = bench(expert_map, dtype, ring_bytes=ring_bytes)
    with nothing_compiled():
        general = bench(expert_map, dtype, ring_bytes=ring_bytes)
    batches = [
        (step, LAYERS[step % 2], count)
        for step, count in enumerate(sizes(3, 150 if least == 1 else 10, least, most), 1)
    ]
    for batch in batches:
        came = []
        for one in (ours, general):
            tag = one.send(*batch)
            came.append(one.answer_all())
            assert came[-1].tag == tag
        assert [came[0].kind, bytes(came[0].parts[0])] == [Kind.ROWS_DONE, bytes(came[1].parts[0])]
    assert general.compiled == 0
    assert 0 < ours.compiled < len(batches) if small else ours.compiled == len(batches)
    told, wanted = ours.stats(), general.stats()
    assert (told.batches, told.rows_per_shard, told.wires) == (wanted.batches, wanted.rows_per_shard, wanted.wires)
    assert told.bytes_sent == wanted.bytes_sent
    for layer, rows in general.router.expert_rows().items():
        assert np.array_equal(ours.router.expert_rows()[layer], rows)
    assert 0.0 < told.longest_wait_s <= told.dispatch_s


def test_batches_of_a_step_and_their_shards_answer_in_any_order(bench: Benches) -> None:
    ours = bench()
    with nothing_compiled():
        general = bench()
    for step in range(1, 30):
        came: list[dict[FrameTag, bytes]] = []
        for one in (ours, general):
            tags = [one.send(step, 2, count, micro) for micro, count in ((2, 5), (1, 3), (0, 9))]
            frames = one.asked_all(17)
            for at in np.random.default_rng(step).permutation(len(frames)):
                name, frame = frames[at]
                one.shards[name].send(Kind.RESULTS, frame.tag, one.results(frame), soon())
            answers = [one.came() for _ in tags]
            came.append({frame.tag: bytes(frame.parts[0]) for frame in answers})
            assert set(came[-1]) == set(tags)
        assert came[0] == came[1]
    assert ours.compiled == ours.stats().batches == 87


@pytest.mark.parametrize(("ring_bytes", "most"), [(1 << 20, 40), (4 << 20, 1500)], ids=["", "frames in several pieces"])
def test_batches_are_handed_over_at_any_moment(bench: Benches, ring_bytes: int, most: int) -> None:
    """Whenever the loop wakes up, what is under way goes on the general way, which has sent none of it."""
    ours = bench(TWICE, ring_bytes=ring_bytes)
    with nothing_compiled():
        general = bench(TWICE, ring_bytes=ring_bytes)
    for step in range(1, 25):
        came: list[dict[FrameTag, bytes]] = []
        for one in (ours, general):
            draws = np.random.default_rng(step)

            def perhaps_wake(one: Bench = one, draws: np.random.Generator = draws) -> None:
                if draws.random() < 0.2:
                    one.router._loop.wake()

            counts = [int(count) for count in draws.integers(1, most, 3)]
            tags = []
            for micro, count in zip((2, 1, 0), counts, strict=True):
                tags.append(one.send(step, 2, count, micro))
                perhaps_wake()
            frames = one.asked_all(sum(counts))
            frames.sort(key=lambda asked: (asked[0], asked[1].tag))
            for at in draws.permutation(len(frames)):
                name, frame = frames[at]
                one.shards[name].send(Kind.RESULTS, frame.tag, one.results(frame), soon())
                perhaps_wake()
            answers = [one.came() for _ in tags]
            came.append({frame.tag: bytes(frame.parts[0]) for frame in answers})
            assert set(came[-1]) == set(tags)
        assert came[0] == came[1]
    assert 0 < ours.compiled < ours.stats().batches == 72
    assert ours.stats().wires == general.stats().wires
    assert ours.stats().rows_per_shard == general.stats().rows_per_shard


def test_traced_and_recorded_batches_go_the_general_way(bench: Benches) -> None:
    one = bench()
    one.send(1, 1, 2, 0, TRACEPARENT.encode())
    assert one.answer_all().kind == Kind.ROWS_DONE
    one.send(2, LAYERS[-1], 2)
    assert one.answer_all().kind == Kind.ROWS_DONE
    assert (one.compiled, one.stats().batches) == (1, 2)
    one.router.start_spans()
    # Once this is in force, the wait has ended that began before the recording.
    one.install(single_replica_map(2, LAYERS, EXPERTS, NAMES))
    one.send(3, 1, 2)
    assert one.answer_all().kind == Kind.ROWS_DONE
    assert {row[0] for row in one.router.take_spans().rows} == {"gate", "dispatch", "experts", "combine"}
    for step in (4, 5):  # the first ends the wait of the general way
        one.send(step, 1, 2)
        one.answer_all()
    assert one.stats().batches == 5
    assert one.compiled >= 2


def test_what_a_lost_shard_owes_is_asked_of_others(bench: Benches) -> None:
    """Some have answered already: what they said is kept."""
    one = bench(TWICE)
    with nothing_compiled():
        general = bench(TWICE)
    general.send(1, 1, 20)
    wanted = bytes(general.answer_all().parts[0])
    one.send(1, 1, 20)
    one.answer("b")
    one.asked("a")
    one.kill("a")
    came = one.answer_all()
    assert (came.kind, bytes(came.parts[0])) == (Kind.ROWS_DONE, wanted)
    assert (one.stats().reroutes, one.compiled) == (1, 0)
    general.send(2, 1, 20)
    wanted = bytes(general.answer_all().parts[0])
    one.send(2, 1, 20)
    assert bytes(one.answer_all().parts[0]) == wanted
    assert one.compiled == 1  # with the shard lost


def test_a_shard_that_refuses(bench: Benches) -> None:
    one = bench(TWICE)
    one.send(1, 1, 20)
    frame = one.asked("a")
    one.shards["a"].send(Kind.FAILED, frame.tag, [b"no memory"], soon())
    assert one.answer_all().kind == Kind.ROWS_DONE
    assert one.stats().reroutes == 1
    alone = bench(ALONE)
    alone.send(1, 1, 20)
    frame = alone.asked("a")
    alone.shards["a"].send(Kind.FAILED, frame.tag, [b"no memory"], soon())
    came = alone.came()
    assert (came.kind, failure_text(came)) == (Kind.FAILED, "no memory")
    for name in ("b", "c"):
        alone.answer(name)  # too late
    alone.send(1, 2, 3)  # of the step that has failed: it is ignored
    alone.send(2, 1, 3)
    came = alone.answer_all()
    assert (came.kind, came.tag.step) == (Kind.ROWS_DONE, 2)


@pytest.mark.parametrize("late", ["attempt", "batch", "epoch"])
def test_answers_to_nothing_are_dropped(bench: Benches, late: str) -> None:
    one = bench()
    tag = one.send(1, 1, 20)
    frame = one.asked("a")
    other = {"attempt": 9, "batch": 77, "epoch": 0}
    wrong = frame.tag._replace(**{"step" if late == "batch" else late: other[late]})
    one.shards["a"].send(Kind.RESULTS, wrong, one.results(frame), soon())
    one.shards["a"].send(Kind.RESULTS, frame.tag, one.results(frame), soon())
    one.shards["a"].send(Kind.RESULTS, frame.tag, one.results(frame), soon())
    came = one.answer_all()
    assert (came.kind, came.tag) == (Kind.ROWS_DONE, tag)
    one.send(2, 1, 4)
    assert one.answer_all().tag.step == 2


def test_results_of_another_size_lose_the_shard(bench: Benches) -> None:
    one = bench(TWICE)
    one.send(1, 1, 20)
    frame = one.asked("a")
    one.shards["a"].send(Kind.RESULTS, frame.tag, [b"short", encode_seconds(1.0)], soon())
    with pytest.raises(PeerGone):
        one.shards["a"].recv(soon())
    one.kill("a")
    assert one.answer_all().kind == Kind.ROWS_DONE
    assert one.stats().reroutes == 1


def test_rows_of_another_size_lose_the_attention_shard(bench: Benches) -> None:
    one = bench()
    one.attention.send(Kind.ROWS, FrameTag(0, 1, 0, 1), [b"x" * 100], soon())
    with pytest.raises(PeerGone):
        one.attention.recv(soon())
    one.router.stats()


def test_a_batch_that_nobody_answers_ends_in_time(bench: Benches) -> None:
    one = bench(timeout_s=0.3)
    one.send(1, 1, 20)
    came = one.came()
    assert came.kind == Kind.FAILED
    assert "no answer within 0.3 s from a, b, c" in failure_text(came)


def test_a_new_step_gives_up_the_one_before(bench: Benches) -> None:
    one = bench()
    one.send(1, 1, 20)
    old = {name: one.asked(name) for name in NAMES}
    tag = one.send(2, 1, 4)
    for name, frame in old.items():
        one.shards[name].send(Kind.RESULTS, frame.tag, one.results(frame), soon())
    came = one.answer_all()
    assert (came.kind, came.tag) == (Kind.ROWS_DONE, tag)
    with pytest.raises(WireTimeout):
        one.attention.recv(time.monotonic() + 0.05)


def test_a_source_that_goes_takes_its_batches_along(bench: Benches) -> None:
    one = bench()
    one.send(1, 1, 20)
    frames = {name: one.asked(name) for name in NAMES}
    one.attention.close()
    one.attention = shm_endpoint("attention-1").connect(one.router._endpoint.address, soon())
    for name, frame in frames.items():
        one.shards[name].send(Kind.RESULTS, frame.tag, one.results(frame), soon())
    one.send(1, 1, 6)
    assert one.answer_all().kind == Kind.ROWS_DONE
    one.attention.close()


def test_a_map_is_committed_at_a_boundary(bench: Benches) -> None:
    """In the first of two layers a step has none; then it goes by the next map."""
    one = bench()
    later = single_replica_map(2, LAYERS, EXPERTS, NAMES[::-1])
    one.send(1, LAYERS[0], 6)
    frames = {name: one.asked(name) for name in NAMES}
    one.prepare(later)
    with pytest.raises(WireTimeout, match="a step in flight"):
        one.router.commit(2, 0.05)
    for name, frame in frames.items():
        assert frame.tag.epoch == 1
        one.shards[name].send(Kind.RESULTS, frame.tag, one.results(frame), soon())
    assert one.came().kind == Kind.ROWS_DONE
    one.prepare(single_replica_map(3, LAYERS, EXPERTS, NAMES[::-1]))
    with pytest.raises(WireTimeout, match="a step in flight"):
        one.router.commit(3, 0.05)
    one.send(1, LAYERS[1], 6)
    assert one.answer_all().kind == Kind.ROWS_DONE
    one.install(single_replica_map(4, LAYERS, EXPERTS, NAMES[::-1]))
    one.send(2, LAYERS[0], 6)
    assert {one.asked(name).tag.epoch for name in NAMES} == {4}


def test_batches_of_many_random_steps_through_losses_and_maps(bench: Benches) -> None:
    """Shards die and maps change at random; every batch has the rows that the gate's choice and the weights make."""
    draws = np.random.default_rng(11)
    one = bench(TWICE)
    with nothing_compiled():
        general = bench(TWICE)
    epoch = 1
    for step in range(1, 120):
        count, event = int(draws.integers(1, 30)), draws.integers(0, 12)
        general.send(step, 1, count)
        wanted = bytes(general.answer_all().parts[0])
        one.send(step, 1, count)
        if event == 0 and len(one.shards) == len(NAMES):
            one.kill(NAMES[int(draws.integers(0, 3))])
        came = one.answer_all()
        assert (came.kind, came.tag.step, bytes(came.parts[0])) == (Kind.ROWS_DONE, step, wanted)
        if event in (1, 2):
            epoch += 1
            one.send(step, 2, 1)  # the step's last layer
            one.answer_all()
            one.install(ExpertMap(epoch, EXPERTS, TWICE.replicas))
    assert one.stats().reroutes > 0
    assert 0 < one.compiled < one.stats().batches


def send(wire: Wire, layer: int, rows: Tensor, pairs: Tensor, step: int) -> None:
    indices = [array_bytes(column.numpy().astype(np.int32)) for column in pairs.unbind(1)]
    wire.send(Kind.DISPATCH, FrameTag(1, step, 0, layer, 3), [tensor_bytes(rows), *indices], soon())


def ask(wire: Wire, layer: int, rows: Tensor, pairs: Tensor, step: int) -> Frame:
    """``pairs`` int [P, 2]: row, expert."""
    send(wire, layer, rows, pairs, step)
    frame = wire.recv(soon())
    return frame._replace(parts=tuple(memoryview(bytearray(part)) for part in frame.parts))


@pytest.fixture
def shards(path: Path) -> Iterator[Callable[..., tuple[ExpertShard, Wire]]]:
    with ExitStack() as stack:

        def make(held: Iterable[tuple[int, int]], dtype: str = "float32", quantization: str = "none"):
            settings = ModelSettings(path, dtype, 0, 2, PATIENCE_S, quantization=quantization)
            shard = ExpertShard("expert-0", settings, partial(shm_endpoint, ring_bytes=64 << 10))
            stack.callback(shard.stop)
            shard.load(1, held)
            wire = shm_endpoint("router-0", ring_bytes=64 << 10).connect(shard.listen(), soon())
            stack.callback(wire.close)
            return shard, wire

        yield make


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "w8a8"), ("bfloat16", "int4")]
)
def test_a_shard_computes_the_same_bits_either_way(
    shards: Callable[..., tuple[ExpertShard, Wire]], dtype: str, quantization: str
) -> None:
    """Of frames that go over the rings' ends, and of some that are too large to be served whole or, in bf16, have too
    many rows for the kernels."""
    held = [(layer, expert) for layer in LAYERS for expert in range(0, EXPERTS, 2)]
    shard, wire = shards(held, dtype, quantization)
    with nothing_compiled():
        general, theirs = shards(held, dtype, quantization)
    draws = torch.Generator().manual_seed(5)
    for step, count in enumerate(sizes(9, 60, 1, 400), 1):
        rows = torch.randn(1 + count // 3, WIDTH, generator=draws).to(getattr(torch, dtype))
        pairs = torch.stack(
            [torch.randint(len(rows), (count,), generator=draws), 2 * torch.randint(8, (count,), generator=draws)], 1
        )
        ours, wanted = (ask(one, LAYERS[step % 2], rows, pairs, step) for one in (wire, theirs))
        assert ours.tag == wanted.tag == FrameTag(1, step, 0, LAYERS[step % 2], 3)
        assert (ours.kind, bytes(ours.parts[0])) == (wanted.kind, bytes(wanted.parts[0]))
        assert (ours.kind, len(ours.parts)) == (Kind.RESULTS, 2)
        assert seconds_from(ours.parts[1]) > 0.0
    told, counted = shard.stats(), general.stats()
    assert (told.rows, told.pairs, told.batches, told.wires) == (
        counted.rows,
        counted.pairs,
        counted.batches,
        counted.wires,
    )
    assert told.busy_s > 0.0
    assert general._express is None
    assert 0 < shard._express.done().batches < told.batches


def test_experts_come_and_go_while_batches_are_computed(shards: Callable[..., tuple[ExpertShard, Wire]]) -> None:
    """Each batch is computed by all of what was held when it came, or refused."""
    shard, wire = shards([(1, 0)])
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    pairs = torch.tensor([[row, 1] for row in range(5)])
    shard.load(2, [(1, 1)])
    wanted = bytes(ask(wire, 1, rows, pairs, 1).parts[0])
    over = threading.Event()

    def change() -> None:
        epoch = 3
        while not over.is_set():
            shard.keep(epoch, [(1, 0)])
            shard.load(epoch + 1, [(1, 1)])
            epoch += 2

    thread = threading.Thread(target=change)
    thread.start()
    kinds, step, end = Counter[int](), 1, soon()
    while min(kinds[Kind.RESULTS], kinds[Kind.FAILED]) < 5 and time.monotonic() < end:
        step += 1
        frame = ask(wire, 1, rows, pairs, step)
        kinds[frame.kind] += 1
        if frame.kind == Kind.RESULTS:
            assert bytes(frame.parts[0]) == wanted
        else:
            assert "expert 1 of layer 1" in failure_text(frame)
    over.set()
    thread.join()
    assert min(kinds[Kind.RESULTS], kinds[Kind.FAILED]) >= 5


def test_a_router_that_always_has_a_frame_keeps_no_others_waiting(
    shards: Callable[..., tuple[ExpertShard, Wire]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has one frame served in a turn. Whoever wakes the loop up, to stop it or to add a wire, waits for one."""
    shard, wire = shards([(1, 0)])
    other = shm_endpoint("router-1", ring_bytes=64 << 10).connect(shard._endpoint.address, soon())
    rows, pairs = torch.ones(2, WIDTH), torch.tensor([[0, 0], [1, 0]])
    wanted = [bytes(ask(one, 1, rows, pairs, 1).parts[0]) for one in (wire, other)]
    express, there, go = shard._express, threading.Event(), threading.Event()
    assert express is not None
    served, compiled_wait = list[int](), express.wait

    def wait(epoll: int, deadline: float) -> Sequence[tuple[int, int]]:
        there.set()
        assert go.wait(PATIENCE_S)
        events = compiled_wait(epoll, deadline)
        served.append(express.done().batches)
        return events

    monkeypatch.setattr(express, "wait", wait)
    shard._loop.wake()
    assert there.wait(PATIENCE_S)
    before = express.done().batches
    for step in range(2, 12):
        for one in (wire, other):
            send(one, 1, rows, pairs, step)
    shard._loop.wake()
    go.set()
    for _ in range(2, 12):
        assert [bytes(one.recv(soon()).parts[0]) for one in (wire, other)] == wanted
    assert served[0] - before == 2
    other.close()


def test_a_shard_records_the_general_way(shards: Callable[..., tuple[ExpertShard, Wire]]) -> None:
    shard, wire = shards([(1, 0)])
    rows, pairs = torch.ones(2, WIDTH), torch.tensor([[0, 0], [1, 0]])
    shard.start_spans()
    ask(wire, 1, rows, pairs, 1)  # perhaps in a wait that began before the recording
    ask(wire, 1, rows, pairs, 2)
    ask(wire, 1, rows, pairs, 3)  # a span is kept behind its answer: by now the second one's is
    assert {row[0] for row in shard.take_spans().rows} == {"compute"}
    ask(wire, 1, rows, pairs, 4)
    ask(wire, 1, rows, pairs, 5)
    assert shard.stats().batches == 5
    assert shard._express.done().batches >= 1
