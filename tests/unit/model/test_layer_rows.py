"""Attention's half of a layer in one call of the kernels, against the same operation by operation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.messages import CPU
from actors.model.batch import StepBatch
from actors.model.layer_rows import LayerRows, TorchRows
from actors.step_batch import step_batch
from tests.kernels import INSTRUCTION_SETS, use
from tests.micro_batched import MicroBatched
from tests.paged_runner import random_ids

CheckpointOf = Callable[..., tuple[Path, Any]]
DTYPES = [torch.float32, torch.bfloat16]
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek": {},
    "deepseek_v2": {},  # a low-rank query, rotated in fp32
    "deepseek_v2_lite": {},  # none
    "deepseek_v3": {},  # rotated in the model's dtype, in pairs
    "glm4_moe": {},  # norms of heads, biases, half of a head is rotated
    "mixtral": {},  # a window
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {"clip_qkv": 0.25},  # norms of all heads together
}


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(request.param, monkeypatch).isa


class Twins:
    """A batch of decodes and a piece of a prompt behind contexts of several lengths, and both ways through it."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.runner = MicroBatched(path, dtype, row_block=8)
        contexts = [(self.runner.add(random_ids(count + more, seed=count)), count, more) for count, more in CONTEXTS]
        self.runner.step([(number, count) for number, count, _ in contexts])
        self.batch = step_batch(self.runner.chunks([(number, more) for number, _, more in contexts]), CPU)
        self.d, self.rows = self.runner.spec.d_model, len(self.batch.token_ids)
        self.caches = [self.runner.cache, copy.deepcopy(self.runner.cache)]

    def native(self, x: Tensor, batch: StepBatch | None = None) -> LayerRows:
        rows = self.runner.model._layer_passes.rows(x.clone(), batch or self.batch, self.caches[0])
        assert not isinstance(rows, TorchRows)
        return rows

    def torch(self, x: Tensor) -> TorchRows:
        model = self.runner.model
        norms = [layer.norms for layer in model._layers]
        return TorchRows(x.clone(), model.attention, norms, model.spec.rms_eps, self.batch, self.caches[1])

    def random(self, seed: int) -> Tensor:
        numbers = torch.randn(self.rows, self.d, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.runner.model._embed.dtype)


CONTEXTS = [(9, 1), (1, 1), (17, 5), (30, 1)]


def close(got: Tensor, wanted: Tensor) -> None:
    loose = 3e-2 if got.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got, wanted, rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_that_of_the_single_operations(
    checkpoint_of: CheckpointOf, family: str, dtype: torch.dtype
) -> None:
    twins = Twins(checkpoint_of(family, 3, **FAMILIES[family])[0], dtype)
    x = twins.random(0)
    ours, theirs = twins.native(x), twins.torch(x)
    for layer in range(twins.runner.spec.n_layers):
        more = [twins.random(seed) for seed in range(1, 1 + layer % 3)]
        normed = [rows.attend(layer, more).clone() for rows in (ours, theirs)]
        close(*normed)
        close(ours.x, theirs.x)
        for own, other in zip(*(cache.planes(layer) for cache in twins.caches), strict=True):
            close(own, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2_lite", "deepseek_v3"])
def test_each_step_is_rounded_where_torch_rounds_it(
    checkpoint_of: CheckpointOf, family: str, dtype: torch.dtype
) -> None:
    """Of numbers whose sum of squares is the same in any order all bits are torch's, up to the next norm.

    1/256 + (1 + 1/512) is 1 in bf16: the sum in brackets is rounded first.
    """
    twins = Twins(checkpoint_of(family, 3)[0], dtype)
    one = torch.sign(twins.random(0))
    x, more = (one / 256, [one, one / 512]) if dtype == torch.bfloat16 else (one, [one, 2 * one])
    ours, theirs = twins.native(x), twins.torch(x)
    for rows in (ours, theirs):
        rows.attend(0, more)
    slots = twins.batch.slots
    own, other = ([plane[slots] for plane in cache.planes(0)] for cache in twins.caches)
    assert torch.equal(own[1], other[1]), "the values, or the rotated keys"
    if family == "mixtral":
        assert torch.equal(own[0], other[0]), "the rotated keys"
        assert torch.equal(ours.x, theirs.x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_row_does_not_look_at_its_mates(checkpoint_of: CheckpointOf, family: str, dtype: torch.dtype) -> None:
    twins = Twins(checkpoint_of(family, 3)[0], dtype)
    x = twins.random(0)
    together = twins.native(x)
    normed = together.attend(0, []).clone()
    segment = twins.batch.segments[-1]
    own = slice(segment.start, segment.start + 1)
    alone = StepBatch(
        *(numbers[own] for numbers in (twins.batch.token_ids, twins.batch.positions, twins.batch.slots)),
        segments=[replace(segment, start=0)],
        output_rows=torch.tensor([0]),
    )
    rows = twins.native(x[own], alone)
    assert torch.equal(rows.attend(0, [])[0], normed[segment.start])
    assert torch.equal(rows.x[0], together.x[segment.start])


def test_several_threads_give_the_same(checkpoint_of: CheckpointOf) -> None:
    twins = Twins(checkpoint_of("deepseek_v3", 3)[0], torch.float32)
    x = twins.random(0)
    one = twins.native(x).attend(0, []).clone()
    torch.set_num_threads(3)
    try:
        assert torch.equal(twins.native(x).attend(0, []), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("field", ["positions", "slots"])
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_row_outside_is_refused_before_anything_changes(checkpoint_of: CheckpointOf, family: str, field: str) -> None:
    twins = Twins(checkpoint_of(family, 3)[0], torch.float32)
    for wrong in (-1, 1 << 40):
        numbers = getattr(twins.batch, field).clone()
        numbers[2] = wrong
        rows = twins.native(twins.random(0), replace(twins.batch, **{field: numbers}))
        before = rows.x.clone()
        with pytest.raises(IndexError, match=rf"row 2 .*{wrong}"):
            rows.attend(0, [])
        assert torch.equal(rows.x, before)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 64), torch.zeros(8, 64, dtype=torch.bfloat16)])
def test_other_rows_cannot_be_added(checkpoint_of: CheckpointOf, wrong: Tensor) -> None:
    twins = Twins(checkpoint_of("glm4_moe", 3)[0], torch.float32)
    with pytest.raises(ValueError, match="to be added are"):
        twins.native(twins.random(0)).attend(0, [wrong])


def test_what_the_kernels_do_not_take_goes_by_torch(checkpoint_of: CheckpointOf) -> None:
    """An indexer; fp16; another form; in the plain mode more rows than torch's products are slower for."""
    with_indexer, plain = (checkpoint_of(family, 3)[0] for family in ("deepseek_v32", "glm4_moe"))
    for path, dtype in ((with_indexer, torch.float32), (plain, torch.float16)):
        runner = MicroBatched(path, dtype, row_block=8)
        batch = step_batch(runner.chunks([(runner.add(random_ids(3, seed=0)), 3)]), CPU)
        x = torch.zeros(3, runner.spec.d_model, dtype=dtype)
        assert isinstance(runner.model._layer_passes.rows(x, batch, runner.cache), TorchRows)
    twins = Twins(plain, torch.float32)
    twins.runner.model.attention.form = "rows"
    assert isinstance(twins.runner.model._layer_passes.rows(twins.random(0), twins.batch, twins.caches[0]), TorchRows)
    runner = MicroBatched(plain, torch.bfloat16)
    for count, native in ((16, True), (17, False)):
        batch = step_batch(runner.chunks([(runner.add(random_ids(count, seed=0)), count)]), CPU)
        x = torch.zeros(count, runner.spec.d_model, dtype=torch.bfloat16)
        assert isinstance(runner.model._layer_passes.rows(x, batch, runner.cache), TorchRows) is not native
