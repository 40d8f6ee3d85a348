"""What ``model`` means: the built-in one, a folder, or a repository; and what every node is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from cluster import model_source as module
from cluster.config import ConfigError, load_config
from cluster.hub import Hub
from cluster.hub_id import HubId
from cluster.model_source import model_name, model_source, pinned_model, resolve_model
from tests.hub_server import HubServer, hub_server
from tests.processes import run
from tests.serving import tiny_model

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": b"w",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub that the environment names."""
    with hub_server() as running:
        monkeypatch.setattr(module, "Hub", lambda: Hub(running.url, tmp_path / "cache"))
        yield running


def test_folders_win_over_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_source("org/tiny") == HubId("org/tiny")
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert model_source("org/tiny") == tmp_path / "org" / "tiny"
    assert model_source("org/tiny@v1") == HubId("org/tiny", "v1")


@pytest.mark.parametrize("path", ["/no/such", "./org/tiny", "../org/tiny", "~/no/such/model", ".."])
def test_what_looks_like_a_path_is_one(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    if path == "..":
        assert model_source(path) == tmp_path
    else:
        with pytest.raises(ConfigError, match=f"model: '{path}' is not a folder; give the folder of a checkpoint"):
            model_source(path)


@pytest.mark.parametrize("text", ["tiny", "a/b/c", "org/tiny@", "org name/x"])
def test_what_is_neither(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder, and no repository is called so; .*ORG/NAME@REVISION"):
        resolve_model(text)


@pytest.mark.parametrize("name", ["cfgs/config.json", "m/model.safetensors"])
def test_names_of_files_are_no_repositories(
    server: HubServer, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"model: '{name}' is neither a folder nor a file here; give the folder"):
        pinned_model(name)
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"model: '{name}' is a file; give the folder"):
        resolve_model(name)
    assert server.asked == []


def test_what_nodes_are_told(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit, so that each node gets the same; a folder without the directory that it was named from."""
    commit = server.publish("org/tiny", FILES)
    assert pinned_model("org/tiny") == f"org/tiny@{commit}"
    assert pinned_model(f"org/tiny@{commit}") == f"org/tiny@{commit}"
    assert pinned_model("default") == "default"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    assert pinned_model("m") == str(tmp_path / "m")
    server.publish("org/tiny", {**FILES, "config.json": b"[]"})
    assert resolve_model(f"org/tiny@{commit}").name == commit


def test_a_link_to_a_folder_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node follows its own, and what it is replaced with has the same name for clients."""
    (tmp_path / "releases" / "v7").mkdir(parents=True)
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "releases" / "v7")
    assert pinned_model(str(current)) == str(current)
    assert model_name(str(current)) == "current"
    monkeypatch.chdir(tmp_path)
    assert pinned_model("current") == pinned_model("./current/") == str(current)
    assert pinned_model("current/..") == str(tmp_path / "releases"), "as the file system has it"


def test_only_the_cache_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with hub_server() as server:
        commit = server.publish("org/tiny", FILES)
        monkeypatch.setattr(module, "Hub", lambda: Hub(server.url, tmp_path))
        assert pinned_model("org/tiny") == f"org/tiny@{commit}"
        assert capsys.readouterr().err == ""
    assert pinned_model("org/tiny") == f"org/tiny@{commit}"
    assert f"taking org/tiny@{commit} from the cache" in capsys.readouterr().err


def test_what_clients_call_it(tmp_path: Path) -> None:
    assert model_name("org/tiny@main") == model_name(f"org/tiny@{'0' * 40}") == "org/tiny"
    assert model_name(str(tmp_path / "gone")) == "gone"
    assert model_name("default") == "smollm2-135m-moe"


def test_the_environment_names_hub_cache_and_token(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads it when it is imported."""
    tiny_model(tmp_path / "model")
    with hub_server() as server:
        commit = server.publish_folder("org/tiny", tmp_path / "model")
        broken = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        broken["model.safetensors"] = save({"lm_head.weight": torch.ones(1)})
        broken_commit = server.publish("org/tiny", broken, "broken")
        server.private.add("org/tiny")
        cache = tmp_path / "home" / "hub"
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(cache.parent), "HF_HUB_CACHE": str(cache), "HF_TOKEN": "wrong"}
        assert "it is private: then HF_TOKEN" in run("inspect", "org/tiny", **env).stderr
        shards = tmp_path / "many.yaml"
        shards.write_text("{experts: {shards: 4096}, gateway: {port: 0, http_port: 0}}")
        env["HF_TOKEN"] = server.token
        served = run("serve", "--model", "org/tiny", "--config", str(shards), **env)
        assert "experts.shards: 4096; allowed are 1 to 16" in served.stderr, "it has read the model's config.json"
        assert "model.safetensors" not in server.fetched()
        served = run("serve", "--model", "org/tiny@broken", "--grpc-port", "0", "--http-port", "0", **env)
        assert f"fetching org/tiny@{broken_commit}: 1 of " in served.stderr
        assert "tensor(s) missing" in served.stderr
        assert (cache / "models--org--tiny" / "snapshots" / broken_commit / "model.safetensors").is_file()
    offline = run("inspect", "org/tiny", "--json", **env, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert f"org/tiny@{commit}" in offline.stdout


def test_the_environment_is_not_read_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model(str(load_config(None, {"model": str(tmp_path)}).model)) == tmp_path
