"""Micro-batches of one step, interleaved: in which order what happens, and that no bit depends on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.messages import CPU
from actors.model.decoder import MoE
from actors.step_batch import split_chunks, step_batch
from tests.micro_batched import MicroBatched
from tests.paged_runner import PagedRunner, random_ids

CheckpointOf = Callable[..., tuple[Path, Any]]
PROMPTS = [random_ids(count, seed=count, vocab=203) for count in (23, 1, 6, 2, 11)]
VOCAB = {"vocab_size": 203}
FAMILIES = ("qwen2_moe", "deepseek_v3", "glm4_moe", "deepseek_v32")


class Noted:
    """Passes on to the experts, and notes the order: (s)tart and (f)inish, layer, micro-batch."""

    def __init__(self, moe: MoE, fail_at: tuple[str, int, int] | None = None) -> None:
        self.moe, self.fail_at = moe, fail_at
        self.events: list[tuple[str, int, int]] = []

    def start(self, layer: int, rows: Tensor, micro_batch: int = 0) -> object:
        self._note("s", layer, micro_batch)
        return layer, micro_batch, self.moe.start(layer, rows, micro_batch)

    def finish(self, handle: object) -> Tensor:
        layer, micro_batch, inner = handle  # type: ignore[misc]
        self._note("f", layer, micro_batch)
        return self.moe.finish(inner)

    def _note(self, *event: Any) -> None:
        self.events.append(event)
        if event == self.fail_at:
            raise ConnectionError("gone")


def greedy(path: Path, parts: int, row_block: int) -> list[list[int]]:
    runner = MicroBatched(path, row_block=row_block, n_blocks=256)
    runner.parts = parts
    return runner.greedy(PROMPTS, 6, chunk=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_however_a_step_is_cut_no_bit_changes(checkpoint_of: CheckpointOf, family: str) -> None:
    """Whole prompts, so that the longest is cut over several micro-batches, then decodes beside pieces of prompts."""
    path, _ = checkpoint_of(family, 5, **VOCAB)
    whole = PagedRunner(path, row_block=8, n_blocks=256)
    wanted = whole.step([(whole.add(ids), len(ids)) for ids in PROMPTS])
    tokens = PagedRunner(path, row_block=8, n_blocks=256).greedy(PROMPTS, 6, chunk=9)
    for parts in (1, 2, 3, 4):
        runner = MicroBatched(path, row_block=8, n_blocks=256)
        runner.parts = parts
        got = runner.step([(runner.add(ids), len(ids)) for ids in PROMPTS])
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
        assert greedy(path, parts, row_block=8) == tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_one_long_prompt_over_micro_batches(checkpoint_of: CheckpointOf, family: str) -> None:
    path, _ = checkpoint_of(family, 5, **VOCAB)
    ids = random_ids(61, seed=7, vocab=203)
    whole = PagedRunner(path)
    wanted = whole.step([(whole.add(ids), 61)])[0]
    for parts in (2, 4, 61):
        runner = MicroBatched(path)
        runner.parts = parts
        got = runner.step([(runner.add(ids), 61)])[0]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_layers_of_micro_batches_interleave(checkpoint_of: CheckpointOf) -> None:
    """Each layer's rows leave before any answer is waited for, and the first is done while others are away."""
    path, _ = checkpoint_of("glm4_moe", 5, **VOCAB)
    runner = MicroBatched(path)
    runner.moe = noted = Noted(runner.moe)
    first, second = runner.spec.moe_layers[:2]
    last = runner.spec.moe_layers[-1]
    batches = [step_batch(part, CPU) for part in split_chunks(runner.chunks([(runner.add(PROMPTS[0]), 23)]), 3)]
    done: list[int] = []

    def note(part: int, hidden: Tensor) -> None:
        done.append(part)
        noted.events.append(("d", part, len(hidden)))

    runner.model.run(batches, runner.cache, noted, note)
    assert noted.events[:3] == [("s", first, n) for n in (2, 1, 0)]
    assert noted.events[3:9] == [(what, at, n) for n in (2, 1, 0) for what, at in (("f", first), ("s", second))]
    assert noted.events[-6:] == [
        ("f", last, 2), ("d", 0, 7), ("f", last, 1), ("d", 1, 8), ("f", last, 0), ("d", 2, 8),
    ]  # fmt: skip


def test_logits_of_some_rows_are_those_of_all(checkpoint_of: CheckpointOf) -> None:
    path, _ = checkpoint_of("glm4_moe", 5, **VOCAB)
    runner = MicroBatched(path, row_block=8)
    (chunk,) = runner.chunks([(runner.add(PROMPTS[0]), 23)])
    batch = step_batch([chunk], CPU)
    hidden: list[Tensor] = []
    runner.model.run([batch], runner.cache, runner.moe, lambda _, rows: hidden.append(rows))
    wanted = runner.model.forward(batch, runner.cache, runner.moe)
    assert wanted.shape == (23, 203)
    for rows in (slice(0, 1), slice(5, 17), slice(22, 23)):
        assert torch.equal(runner.model.head(hidden[0][rows]), wanted[rows])
    batch.output_rows = torch.tensor([22, 4])
    assert torch.equal(runner.model.forward(batch, runner.cache, runner.moe), wanted[[22, 4]])


@pytest.mark.parametrize("what", ["s", "f", "done"])
def test_a_failure_leaves_nothing_half_driven(
    checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, _ = checkpoint_of("glm4_moe", 5, **VOCAB)
    runner = MicroBatched(path)
    layer = runner.spec.moe_layers[-1]
    passes: list[Any] = []
    begin = runner.model.layers
    monkeypatch.setattr(runner.model, "layers", lambda *args: passes.append(begin(*args)) or passes[-1])
    batches = [step_batch(part, CPU) for part in split_chunks(runner.chunks([(runner.add(PROMPTS[0]), 23)]), 3)]

    def fail(part: int, hidden: Tensor) -> None:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        runner.model.run(batches, runner.cache, Noted(runner.moe, (what, layer, 1)), fail)
    assert [one.gi_frame for one in passes] == [None] * 3
