"""Configuration: what is accepted, and what is said about the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ConfigError, load_config


def written(path: Path, text: str) -> Path:
    file = path / "server.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_and_flags_over_the_file(tmp_path: Path) -> None:
    assert load_config(None).model == "default"
    file = written(tmp_path, "model: /models/a\nexperts: {shards: 3}\nattention: {kv_memory: 1.5GiB}\n")
    config = load_config(file, {"model": "default", "gateway.port": 0})
    assert (config.model, config.experts.shards, config.gateway.port) == ("default", 3, 0)
    assert config.attention.kv_memory == 3 * 2**29


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == load_config(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts: {shard: 2}", r"experts\.shard: unknown key; allowed here: cpus, node_labels, shards, threads"),
        ("modle: x", r"modle: unknown key; allowed here: attention, "),
        ("experts: {shards: 0}", r"experts\.shards: .*greater than or equal to 1 \(given 0\)"),
        ("experts: {shards: two}", r"experts\.shards: .*integer.* \(given 'two'\)"),
        ("transport: pigeon", r"transport: .*'auto', 'shm', 'tcp' or 'local' \(given 'pigeon'\)"),
        ("dtype: int3", r"dtype: .*'auto', 'float32'.* \(given 'int3'\)"),
        ("attention: {kv_memory: 3 bananas}", r"attention\.kv_memory: .*512MiB.*\(given '3 bananas'\)"),
        ("gateway: {port: 70000}", r"gateway\.port: .*65535"),
        ("attention: {token_budget: 8}", r"attention: .*token_budget is 8, must be at least max_running \(64\)"),
        ("attention: 3", r"attention: "),
        ("- model", "expected keys with values, found list"),
        ("model: [", "not valid YAML"),
    ],
)
def test_errors_name_the_key_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_flags_meet_a_file_with_the_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gateway: "):
        load_config(written(tmp_path, "gateway: 7"), {"gateway.port": 1})


def test_importing_it_is_light() -> None:
    """The configuration is read by tools that have neither torch nor Ray at hand."""
    code = "import sys, cluster.config; sys.exit(bool({'torch', 'ray', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
