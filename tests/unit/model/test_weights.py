from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.model.decoder import AttentionModel
from actors.model.errors import CheckpointError
from actors.model.families import load_spec
from actors.model.reader import TensorReader
from actors.model.weights import Checkpoint
from tests.checkpoints import write_deepseek_v3

SHARDED = "model.safetensors.index.json"


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


def edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / SHARDED).read_text())
    change(index)
    (folder / SHARDED).write_text(json.dumps(index))


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


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1])
def test_truncation_is_found_when_opening(small: Path, kept: int) -> None:
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated"):
        Checkpoint(small)


def test_trailing_bytes_are_found(small: Path) -> None:
    with (small / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        Checkpoint(small)


def with_header(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "header is not valid JSON"),
        (b"\xff\xfe", "header is not valid JSON"),
        (b"[]", "header is list, expected a JSON object"),
        (b'{"a": 1}', "entry of tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "entry of tensor 'a' is malformed"),
        (b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}', "entry of tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"'a' spans 0\.\.4, expected 8 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', "tensor 'a' is malformed"),
    ],
)
def test_bad_headers(tmp_path: Path, header: bytes, message: str) -> None:
    with_header(tmp_path, header, b"1234")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_what_only_the_format_library_refuses_is_named(tmp_path: Path) -> None:
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    with_header(tmp_path, f'{{"a": {entry}, "b": {entry}}}'.encode(), b"1234")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be"):
        checkpoint.read("a", (1,))


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        Checkpoint(tmp_path)


def test_sharded(sharded: Path) -> None:
    with Checkpoint(sharded) as checkpoint:
        model = AttentionModel.load(load_spec(sharded), checkpoint, torch.float32)
        assert checkpoint.read("lm_head.weight", (256, 64)).shape == (256, 64)
    assert model.spec.n_layers == 3


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name}: no such file"):
        Checkpoint(sharded)


def test_truncated_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[-1]
    os.truncate(victim, victim.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=f"{victim.name}: is truncated"):
        Checkpoint(sharded)


def test_index_that_promises_a_tensor_its_file_has_not(sharded: Path) -> None:
    name = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, lambda index: index["weight_map"].update(ghost=name))
    with pytest.raises(CheckpointError, match=f"{name}: has no tensor 'ghost'"):
        Checkpoint(sharded)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", ""])
def test_index_that_leads_out_of_the_folder(sharded: Path, file: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update(ghost=file))
    with pytest.raises(CheckpointError, match="expected a plain file name"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', "\xff"])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / SHARDED).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"index\.json: is not a JSON object with a weight_map"):
        Checkpoint(tmp_path)


def test_stacked_reports_each_tensor(small: Path) -> None:
    seen: list[int] = []
    with Checkpoint(small) as checkpoint:
        read = TensorReader(checkpoint, torch.float32, progress=seen.append)
        both = read.stacked([("b", (4,)), ("big", (1,))])
    assert both.tolist() == [1, 1, 1, 1, 1e6]
    assert seen == [8, 4]


def test_attention_shard_reads_neither_gates_nor_experts(deepseek: tuple[Path, Any]) -> None:
    seen: list[int] = []
    with Checkpoint(deepseek[0]) as checkpoint:
        AttentionModel.load(load_spec(deepseek[0]), checkpoint, torch.float32, progress=seen.append)
        routed = 2 * (16 * 3 * 32 * 64 + 16 * 64 + 16) * 4
        held = sum(parameter.nbytes for parameter in deepseek[1].state_dict().values())
        assert checkpoint.bytes_read == sum(seen) == held - routed
