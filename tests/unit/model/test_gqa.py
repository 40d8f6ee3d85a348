"""Norms of whole projections and clipping, as OLMoE has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.model.decoder import AttentionModel
from actors.model.errors import CheckpointError
from actors.model.families import load_spec
from actors.model.weights import Checkpoint
from tests.checkpoints import write_olmoe
from tests.paged_runner import PagedRunner, random_ids
from tests.stepwise import assert_every_way

LENGTHS = (33, 1, 9, 20)
CASES: dict[str, dict[str, Any]] = {
    "whole_norm": {},
    "clip": {"clip_qkv": 0.7},
    "grouped_and_clip": {"clip_qkv": 1.1, "num_key_value_heads": 2},
    "bias": {"attention_bias": True},
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
@pytest.mark.parametrize("row_block", [0, 8])
def test_olmoe_attention(tmp_path: Path, overrides: dict[str, Any], row_block: int) -> None:
    model = write_olmoe(tmp_path, seed=1, **overrides)
    prompts = [random_ids(count, seed=count) for count in LENGTHS]
    assert_every_way(tmp_path, model, prompts, row_block)


def test_the_clip_cuts_values_too(tmp_path: Path) -> None:
    write_olmoe(tmp_path, seed=1, clip_qkv=0.25)
    runner = PagedRunner(tmp_path)
    runner.step([(runner.add(random_ids(20, seed=0)), 20)])
    # Rotation turns a pair by up to sqrt(2); values are not rotated.
    keys, values = runner.cache.read(0, torch.arange(96 * 4))
    assert values.abs().max() == 0.25
    assert 0.25 < keys.abs().max() <= 0.25 * 2**0.5 + 1e-6


def test_a_norm_of_another_width_is_refused(tmp_path: Path) -> None:
    write_olmoe(tmp_path)
    spec = load_spec(tmp_path)
    spec = replace(spec, attn=replace(spec.attn, qk_norm="head"))
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"q_norm.weight.*\[64\].*\[16\]"):
        AttentionModel.load(spec, checkpoint, torch.float32)
