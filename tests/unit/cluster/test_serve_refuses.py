"""What ``expertmesh serve`` says, quickly and before anything is started, about what it cannot serve."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.authority import Authority, Pair
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
    "unknown family": (lambda f: edit_config(f, model_type="gpt9"), r"model_type.*gpt9.*'deepseek_v3', .*'glm4_moe'"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer.json"),
}


def refused(*arguments: str, **environment: str) -> str:
    """The one line on stderr."""
    result = run("serve", *arguments, timeout_s=60, **environment)
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
    assert re.search(message, refused("--model", str(folder), "--grpc-port", "0", "--http-port", "0"))


def test_an_unknown_path() -> None:
    assert "'/no/such/model' is not a folder" in refused("--model", "/no/such/model")


def test_a_typo_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("experts: {shrads: 2}")
    line = refused("--config", str(tmp_path / "a.yaml"))
    assert re.search(r"experts\.shrads: unknown key; allowed here: .*cpus, .*shards, .*threads", line)


def test_a_port_in_use(sound: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"gateway.port: {port} is in use on 127.0.0.1" in refused(
            "--model", str(sound), "--grpc-port", str(port), "--http-port", "0"
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pem"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.sign("127.0.0.1")


def written(folder: Path, gateway: dict[str, object], **keys: object) -> str:
    """A configuration on a port that nobody else uses."""
    file = folder / "server.yaml"
    file.write_text(yaml.safe_dump({**keys, "gateway": {"port": 0, **gateway}}))
    return str(file)


def test_a_door_that_would_stand_open(tmp_path: Path, pair: Pair) -> None:
    line = refused("--config", written(tmp_path, gateway={"host": "0.0.0.0"}))
    assert "gateway.host: '0.0.0.0' is not loopback and gateway.tls and access.tokens not set" in line
    assert "--insecure" in line
    tls = {"certificate": str(pair.certificate), "key": str(pair.key)}
    line = refused("--config", written(tmp_path, gateway={"host": "::", "tls": tls}))
    assert "gateway.host: '::' is not loopback and access.tokens not set" in line
    tokens = {"tokens": [{"sha256": "0" * 64, "tenant": "a"}]}
    line = refused("--config", written(tmp_path, gateway={"host": "0.0.0.0"}, access=tokens))
    assert "gateway.host: '0.0.0.0' is not loopback and gateway.tls not set" in line


def test_an_open_door_that_is_meant(tmp_path: Path) -> None:
    """It goes on to the next check, with a warning for each lock that is missing."""
    tokens = {"tokens": [{"sha256": "0" * 64, "tenant": "a"}]}
    for access, keys in (({}, ["gateway.tls", "access.tokens"]), (tokens, ["gateway.tls"])):
        file = written(tmp_path, gateway={"host": "0.0.0.0"}, access=access, model="/no/such/model")
        result = run("serve", "--insecure", "--config", file)
        *warnings, error = result.stderr.strip().splitlines()
        assert "'/no/such/model' is not a folder" in error
        assert len(warnings) == len(keys)
        for warning, key in zip(warnings, keys, strict=True):
            assert warning.startswith(f"warning: gateway.host: 0.0.0.0 is not loopback and {key} is not set: ")


def test_tls_files_that_cannot_be_used(tmp_path: Path, authority: Authority, pair: Pair) -> None:
    other = authority.sign("other.example").key
    tls = {"certificate": str(pair.certificate), "key": str(other)}
    line = refused("--config", written(tmp_path, gateway={"tls": tls}))
    assert line == f"error: gateway.tls.key: {other}: not the key of the certificate in {pair.certificate}"


def test_files_for_tls_between_actors_that_cannot_be_used(tmp_path: Path, pair: Pair) -> None:
    other = Authority(tmp_path / "other").certificate
    tls = {"certificate": str(pair.certificate), "key": str(pair.key), "ca": str(other)}
    line = refused("--config", written(tmp_path, gateway={}, data_plane={"tls": tls}))
    assert line.startswith(f"error: data_plane.tls.certificate: {pair.certificate}: not good for wires under ")
    assert str(other) in line


def test_more_context_than_the_model_has(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("context_length: 100000")
    line = refused("--model", str(sound), "--config", str(tmp_path / "a.yaml"), "--grpc-port", "0", "--http-port", "0")
    assert "context_length: 100000 is over the model's 512" in line


def test_kernels_that_this_machine_has_not() -> None:
    assert refused(EXPERTMESH_ISA="avx9").startswith("error: EXPERTMESH_ISA: 'avx9'; here it may be ")
