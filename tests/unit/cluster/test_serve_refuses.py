"""What ``expertmesh serve`` says, quickly and before anything is started, about what it cannot serve."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import run
from tests.serving import tiny_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound")
    tiny_model(path, max_shard_size="300KB")
    return path


def edit_config(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def cut(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), r"model-00002-of-0000\d.safetensors"),
    "truncated shard": (cut, r"model-00002-of-0000\d.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config.json"),
    "unknown family": (lambda f: edit_config(f, model_type="gpt9"), r"model_type.*gpt9.*'deepseek_v3', 'glm4_moe'"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer.json"),
}


def refused(*arguments: str) -> str:
    """The one line on stderr."""
    result = run("serve", *arguments, timeout_s=60)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(sound: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    break_it, message = DAMAGES[damage]
    break_it(folder)
    assert re.search(message, refused("--model", str(folder), "--grpc-port", "0"))


def test_an_unknown_path() -> None:
    assert "'/no/such/model' is not a folder" in refused("--model", "/no/such/model")


def test_a_typo_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("experts: {shrads: 2}")
    line = refused("--config", str(tmp_path / "a.yaml"))
    assert "experts.shrads: unknown key; allowed here: cpus, node_labels, shards, threads" in line


def test_a_port_in_use(sound: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"gateway.port: {port} is in use on 127.0.0.1" in refused(
            "--model", str(sound), "--grpc-port", str(port)
        )


def test_more_context_than_the_model_has(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("context_length: 100000")
    line = refused("--model", str(sound), "--config", str(tmp_path / "a.yaml"), "--grpc-port", "0")
    assert "context_length: 100000 is over the model's 512" in line
