"""Micro-batches through a real router and two real expert shards: the same bits, whatever happens on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.expert import ExpertShard
from actors.frames import Kind
from actors.messages import CPU
from actors.moe_client import MoEClient, MoEUnavailable, RowsSent
from actors.router import Router
from actors.settings import ModelSettings
from actors.transport.base import Address, EndpointLike, WireTimeout
from actors.transport.local import LocalNetwork
from placement.expert_map import ExpertMap, replaced, single_replica_map
from tests.checkpoints import write_deepseek_v3, write_glm4_moe
from tests.micro_batched import MicroBatched
from tests.paged_runner import PagedRunner, random_ids
from tests.shared_memory import shm_endpoint

PATIENCE_S = 20.0
NAMES = ("expert-0", "expert-1")
PROMPTS = [random_ids(count, seed=count, vocab=203) for count in (29, 1, 6, 11)]
COUNT = 4


@pytest.fixture(scope="module", params=[write_glm4_moe, write_deepseek_v3])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GQA, and MLA."""
    folder = tmp_path_factory.mktemp("model")
    request.param(folder, seed=3, vocab_size=203)
    return folder


@pytest.fixture(scope="module")
def wanted(path: Path) -> list[list[int]]:
    return PagedRunner(path, row_block=8).greedy(PROMPTS, COUNT)


class Routed(MicroBatched):
    """Its experts are at two shards behind a router, all in threads of this process. ``on_start`` sees each batch that
    has left."""

    make_network: Callable[[], Callable[..., EndpointLike]]

    def __init__(self, path: Path, stack: ExitStack, timeout_s: float = PATIENCE_S) -> None:
        super().__init__(path, row_block=8)
        self._settings = ModelSettings(path, "float32", 8, 1, timeout_s)
        self._endpoint, self._stack = Routed.make_network(), stack
        self.shards: dict[str, ExpertShard] = {}
        self.router = Router("router-0", self._settings, self._endpoint)
        stack.callback(self.router.stop)
        router = self.router.load()
        self.map = single_replica_map(1, self.spec.moe_layers, self.spec.moe.n_experts, NAMES)
        self._addresses: dict[str, Address] = {}
        self.prepare(self.map)
        self.router.commit(1, PATIENCE_S)
        wire = self._endpoint("attention-0").connect(router, time.monotonic() + PATIENCE_S)
        stack.callback(wire.close)
        self.client = MoEClient(wire, torch.float32, CPU, self.spec.d_model, timeout_s, self.spec.moe_layers)
        self.moe = self
        self.on_start: Callable[[int, int], None] = lambda layer, micro_batch: None

    def prepare(self, expert_map: ExpertMap) -> None:
        for name in expert_map.shards:
            if name not in self.shards:
                self.shards[name] = ExpertShard(name, self._settings, self._endpoint)
                self._stack.callback(self.shards[name].stop)
                self._addresses[name] = self.shards[name].listen()
            self.shards[name].load(expert_map.epoch, expert_map.held_by(name))
        self.router.prepare(expert_map, self._addresses, None, PATIENCE_S)

    def step(self, work: Sequence[tuple[int, int]]) -> list[Tensor]:
        """See PagedRunner."""
        self.client.begin_step()
        return super().step(work)

    def start(self, layer: int, rows: Tensor, micro_batch: int = 0) -> RowsSent:
        sent = self.client.start(layer, rows, micro_batch)
        self.on_start(layer, micro_batch)
        return sent

    def finish(self, handle: object) -> Tensor:
        return self.client.finish(handle)


@pytest.fixture(params=["local", "shm"], autouse=True)
def _over(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the general way, and by express."""
    network = (lambda: shm_endpoint) if request.param == "shm" else lambda: LocalNetwork().endpoint
    monkeypatch.setattr(Routed, "make_network", staticmethod(network), raising=False)


@contextmanager
def routed(path: Path, parts: int, **options: Any) -> Iterator[Routed]:
    with ExitStack() as stack:
        runner = Routed(path, stack, **options)
        runner.parts = parts
        yield runner


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_tokens_are_the_same_in_however_many_micro_batches(path: Path, wanted: list[list[int]], parts: int) -> None:
    with routed(path, parts) as runner:
        assert runner.greedy(PROMPTS, COUNT) == wanted
        layers = len(runner.spec.moe_layers)
        assert runner.client.batches == parts * layers
        assert runner.router.stats().batches == COUNT * parts * layers
        assert 0 < runner.client.experts_s < runner.client.batches * PATIENCE_S
        assert runner.client.transfer_s > 0


def test_each_row_has_the_same_bits(path: Path) -> None:
    whole = PagedRunner(path, row_block=8)
    logits = whole.step([(whole.add(ids), len(ids)) for ids in PROMPTS])
    for parts in (2, 4):
        with routed(path, parts) as runner:
            got = runner.step([(runner.add(ids), len(ids)) for ids in PROMPTS])
            assert all(torch.equal(one, other) for one, other in zip(got, logits, strict=True))


def test_a_map_is_committed_between_steps_and_not_between_micro_batches(path: Path, wanted: list[list[int]]) -> None:
    """In the middle of a step, in its last layer too, the old map stays in force until the last micro-batch comes."""
    with routed(path, 3) as runner:
        layers, epochs, tried = runner.spec.moe_layers, set[int](), list[int]()

        def swapped(epoch: int) -> ExpertMap:
            return single_replica_map(epoch, layers, runner.spec.moe.n_experts, NAMES[::-1])

        def commit(layer: int, micro_batch: int) -> None:
            if (layer, micro_batch) in ((layers[0], 0), (layers[-1], 1)) and len(tried) < 2:
                tried.append(2 + len(tried))
                runner.prepare(swapped(tried[-1]))
                with pytest.raises(WireTimeout, match=f"a step in flight kept epoch {tried[-1]} from its commit"):
                    runner.router.commit(tried[-1], 0.05)
            epochs.add(runner.router.stats().epoch)

        runner.on_start = commit
        runner.step([(runner.add(ids), len(ids)) for ids in PROMPTS])
        assert (tried, epochs) == ([2, 3], {1})
        runner.prepare(swapped(4))
        runner.router.commit(4, PATIENCE_S)
        assert runner.greedy(PROMPTS, COUNT) == wanted
        assert epochs == {1, 4}


def test_a_lost_shard_costs_nothing_when_the_next_map_replaces_it(path: Path, wanted: list[list[int]]) -> None:
    """It ends when the first micro-batch of a layer is on its way; the others of the step are sent meanwhile."""
    with routed(path, 3) as runner:
        ended: list[int] = []

        def end(layer: int, micro_batch: int) -> None:
            if micro_batch == 2 and not ended:
                ended.append(layer)
                runner.shards["expert-1"].stop()
            elif micro_batch == 0 and len(ended) == 1:
                ended.append(layer)
                runner.prepare(replaced(runner.map, "expert-1", "expert-2", 2))
                runner.router.commit(2, PATIENCE_S)

        runner.on_start = end
        assert runner.greedy(PROMPTS, COUNT) == wanted
        assert len(ended) == 2
        assert runner.router.stats().reroutes > 0


def test_one_failed_micro_batch_voids_its_step_and_no_other(
    path: Path, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with routed(path, 3) as runner:
        shard, failing = runner.shards["expert-0"], [True]
        compute = shard._compute

        def broken(frame: Any) -> Tensor:
            if failing and frame.kind == Kind.DISPATCH and frame.tag.micro_batch == 1:
                failing.clear()
                raise MemoryError("no memory")
            return compute(frame)

        monkeypatch.setattr(shard, "_compute", broken)
        if shard._express is not None:
            monkeypatch.setattr(shard._express, "usable", lambda: False)  # it would not go through _compute
            shard._loop.wake()
        with pytest.raises(MoEUnavailable, match="no memory"):
            runner.step([(runner.add(ids), len(ids)) for ids in PROMPTS])
        runner.client.abandon()
        assert runner.greedy(PROMPTS, COUNT) == wanted
