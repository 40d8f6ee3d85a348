"""Which files of a folder are read as its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.model.errors import CheckpointError
from actors.model.weights import Checkpoint
from tests.checkpoints import write_deepseek_v3

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def save(path: Path, **values: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.tensor([float(value)]) for name, value in values.items()}, path)


def write_index(folder: Path, **weight_map: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def values(folder: Path) -> dict[str, float]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name, (1,)).item() for name in checkpoint.names()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    write_deepseek_v3(path, max_shard_size="200KB")
    return path


@pytest.fixture
def sharded(written: Path, tmp_path: Path) -> Path:
    """A checkpoint in several files, which the test may spoil."""
    files = [*written.glob("*.safetensors"), written / INDEX]
    assert len(files) > 4
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_index(folder: Path, change: Callable[[Any], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


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


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', "\xff", "[" * 100_000])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"index\.json: is not a JSON object with a weight_map"):
        Checkpoint(tmp_path)


def test_index_that_places_a_tensor_twice(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", a=1)
    save(tmp_path / "y.safetensors", a=2)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"index\.json: .*key 'a' is there twice"):
        Checkpoint(tmp_path)


def test_the_index_says_which_file_is_meant(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", a=1, b=2)
    save(tmp_path / "y.safetensors", b=3, c=4)
    save(tmp_path / "consolidated.safetensors", a=5)
    write_index(tmp_path, a="x.safetensors", b="y.safetensors")
    assert values(tmp_path) == {"a": 1, "b": 3}


def test_a_single_file_goes_before_an_index_of_others(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, a=1)
    save(tmp_path / "x.safetensors", a=2)
    write_index(tmp_path, a="x.safetensors")
    assert values(tmp_path) == {"a": 1}
    write_index(tmp_path, a="x.safetensors", b=SINGLE)
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: has no tensor 'b'"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "names", [["weights.safetensors"], ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]]
)
def test_files_of_other_names(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        save(tmp_path / name, **{f"t{number}": number})
    save(tmp_path / "adapter_model.safetensors", t0=9)
    (tmp_path / "._weights.safetensors").write_bytes(b"what another system leaves")
    assert values(tmp_path) == {f"t{number}": number for number in range(len(names))}


def test_files_without_an_index_may_not_share_a_tensor(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", a=1, b=1)
    save(tmp_path / "y.safetensors", b=1, c=1)
    with pytest.raises(CheckpointError, match=r"y\.safetensors: tensor 'b' is in x\.safetensors as well"):
        Checkpoint(tmp_path)


def test_files_without_an_index_must_be_complete(tmp_path: Path) -> None:
    save(tmp_path / "model-00001-of-00003.safetensors", a=1)
    save(tmp_path / "model-00003-of-00003.safetensors", b=1)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: no such file, though model-00001"):
        Checkpoint(tmp_path)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    save(tmp_path / "adapter_model.safetensors", a=1)
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor .* but an adapter's"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "x.pt", "pytorch_model.bin.index.json"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"only pickled weights \({name}\), expected safetensors"):
        Checkpoint(tmp_path)
    save(tmp_path / SINGLE, a=1)
    assert values(tmp_path) == {"a": 1}


def test_folders_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        Checkpoint(tmp_path)


def test_the_layout_of_the_hugging_face_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, digest in enumerate(("aa", "bb")):
        save(tmp_path / "models--x" / "blobs" / digest, **{f"t{number}": number})
        (snapshot / f"m{number}.safetensors").symlink_to(f"../../blobs/{digest}")
    write_index(snapshot, t0="m0.safetensors", t1="m1.safetensors")
    assert values(snapshot) == {"t0": 0, "t1": 1}
    (tmp_path / "models--x" / "blobs" / "bb").unlink()
    with pytest.raises(CheckpointError, match=r"m1\.safetensors: no such file, though the checkpoint needs it"):
        Checkpoint(snapshot)
