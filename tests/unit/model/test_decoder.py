"""The attention shard's part: what it reads, and the shared expert that has a gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.model.decoder import AttentionModel
from actors.model.families import load_spec
from actors.model.weights import Checkpoint, CheckpointError
from tests.checkpoints import WRITERS
from tests.paged_runner import PagedRunner, random_ids

CheckpointOf = Callable[..., tuple[Path, Any]]
ODD = {
    "hidden_size": 52, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10,
    "moe_intermediate_size": 27, "shared_expert_intermediate_size": 45, "vocab_size": 203,
}  # fmt: skip


def step_of(path: Path, dtype: torch.dtype, mates: int) -> torch.Tensor:
    """Logits of one sequence, computed beside ``mates`` others, in the deterministic mode."""
    runner = PagedRunner(path, dtype, row_block=8, n_blocks=512)
    work = [(runner.add(random_ids(3 + i % 5, seed=i, vocab=203)), 3 + i % 5) for i in range(mates)]
    return runner.step([*work, (runner.add(random_ids(61, seed=99, vocab=203)), 61)])[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_shared_expert_does_not_look_at_mates(checkpoint_of: CheckpointOf, dtype: torch.dtype) -> None:
    path, _ = checkpoint_of("qwen2_moe", 4, **ODD)
    want = step_of(path, dtype, 0)
    for mates in (1, 2, 3, 5, 16, 31):
        assert torch.equal(step_of(path, dtype, mates), want)


@pytest.mark.parametrize("family", WRITERS)
def test_it_reads_all_but_gates_and_routed_experts(checkpoint_of: CheckpointOf, family: str) -> None:
    path, _ = checkpoint_of(family)
    seen: list[int] = []
    with Checkpoint(path) as checkpoint:
        theirs = [name for name in checkpoint.names() if ".experts." not in name and ".gate." not in name]
        expected = sum(math.prod(checkpoint.shape(name)) for name in theirs) * 4
        AttentionModel.load(load_spec(path), checkpoint, torch.float32, progress=seen.append)
        assert checkpoint.bytes_read == sum(seen) == expected


def test_a_checkpoint_without_the_shared_experts_gate_is_refused(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = checkpoint_of("qwen2_moe")
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=name):
        AttentionModel.load(load_spec(path), checkpoint, torch.float32)
