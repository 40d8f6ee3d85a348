from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.model.decoder import AttentionModel
from actors.model.errors import CheckpointError
from actors.model.families import load_spec
from actors.model.gate import Gate
from actors.model.reader import TensorReader
from actors.model.weights import Checkpoint
from tests.checkpoints import write_deepseek_v3


@pytest.fixture
def small(tmp_path: Path) -> Path:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "n": torch.tensor([1.0, float("nan")]),
        "i": torch.tensor([1, 2]),
        "big": torch.tensor([1e6]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_deepseek_v3(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


def test_read(small: Path) -> None:
    with Checkpoint(small) as checkpoint:
        assert checkpoint.names() == {"a", "b", "n", "i", "big"}
        assert checkpoint.has("a")
        assert not checkpoint.has("c")
        assert torch.equal(checkpoint.read("a", (2, 3)), torch.arange(6.0).view(2, 3))
        assert checkpoint.bytes_read == 24
        wide = checkpoint.read("b", (4,), torch.float32)
        assert wide.dtype == torch.float32
        assert checkpoint.bytes_read == 32
        assert checkpoint.read("b", (4,)).dtype == torch.bfloat16
        assert (checkpoint.dtype("b"), checkpoint.shape("a")) == (torch.bfloat16, (2, 3))
        with pytest.raises(CheckpointError, match="has no tensor 'c'"):
            checkpoint.dtype("c")


def test_tensors_outlive_the_checkpoint_and_the_file(small: Path) -> None:
    with Checkpoint(small) as checkpoint:
        a = checkpoint.read("a", (2, 3))
    (small / "model.safetensors").write_bytes(b"")
    assert a.sum() == 15
    assert a.data_ptr() % 64 == 0


def test_close_lets_go_of_files(small: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint(small)
    checkpoint.read("a", (2, 3))
    checkpoint.close()
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before
    maps = Path("/proc/self/maps").read_text()
    assert str(small) not in maps


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("c", (1,), r"has no tensor 'c' \(expected shape \[1\]\)"),
        ("a", (3, 2), r"model\.safetensors: tensor 'a' has shape \[2, 3\], expected \[3, 2\]"),
        ("a", (6,), r"tensor 'a' has shape \[2, 3\], expected \[6\]"),
        ("i", (2,), r"model\.safetensors: tensor 'i' is torch\.int64, expected one of torch\.float32"),
        ("n", (2,), r"model\.safetensors: tensor 'n' holds NaN or infinity"),
    ],
)
def test_tensors_that_are_refused(small: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    with Checkpoint(small) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.read(name, shape)


def test_what_overflows_the_wanted_dtype_is_refused(small: Path) -> None:
    with Checkpoint(small) as checkpoint, pytest.raises(CheckpointError, match=r"'big' .*finite torch\.float16"):
        checkpoint.read("big", (1,), torch.float16)


def test_the_finite_check_can_be_switched_off(small: Path) -> None:
    with Checkpoint(small, check_finite=False) as checkpoint:
        assert checkpoint.read("n", (2,))[1].isnan()


def test_sharded(sharded: Path) -> None:
    with Checkpoint(sharded) as checkpoint:
        model = AttentionModel.load(load_spec(sharded), checkpoint, torch.float32)
        assert checkpoint.read("lm_head.weight", (256, 64)).shape == (256, 64)
    assert model.spec.n_layers == 3


def test_stacked_reports_each_tensor(small: Path) -> None:
    seen: list[int] = []
    with Checkpoint(small) as checkpoint:
        read = TensorReader(checkpoint, torch.float32, progress=seen.append)
        both = read.stacked([("b", (4,)), ("big", (1,))])
    assert both.tolist() == [1, 1, 1, 1, 1e6]
    assert seen == [8, 4]


def test_router_reads_gates_alone(deepseek: tuple[Path, Any]) -> None:
    with Checkpoint(deepseek[0]) as checkpoint:
        Gate.load(load_spec(deepseek[0]), checkpoint, torch.float32)
        assert checkpoint.bytes_read == 2 * (16 * 64 + 16) * 4


def test_attention_shard_reads_neither_gates_nor_experts(deepseek: tuple[Path, Any]) -> None:
    seen: list[int] = []
    with Checkpoint(deepseek[0]) as checkpoint:
        AttentionModel.load(load_spec(deepseek[0]), checkpoint, torch.float32, progress=seen.append)
        routed = 2 * (16 * 3 * 32 * 64 + 16 * 64 + 16) * 4
        held = sum(parameter.nbytes for parameter in deepseek[1].state_dict().values())
        assert checkpoint.bytes_read == sum(seen) == held - routed
