"""Configuration: what is accepted, and what is said about the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.config import ConfigError, load_config


def written(path: Path, text: str) -> Path:
    file = path / "server.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def tokens(*fields: str) -> str:
    """Sound entries of a tenant, with these fields over them, as YAML."""
    sound = {"sha256": "f" * 64, "tenant": "acme"}
    return yaml.safe_dump({"access": {"tokens": [{**sound, **yaml.safe_load(f"{{{text}}}")} for text in fields]}})


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
        ("experts: {shard: 2}", r"experts\.shard: unknown key; allowed here: .*cpus, .*shards, .*threads"),
        ("modle: x", r"modle: unknown key; allowed here: access, attention, "),
        ("experts: {shards: -1}", r"experts\.shards: .*greater than or equal to 0 \(given -1\)"),
        ("experts: {shards: two}", r"experts\.shards: .*integer.* \(given 'two'\)"),
        ("transport: pigeon", r"transport: .*'auto', 'nccl', 'shm', 'tcp' or 'local' \(given 'pigeon'\)"),
        (
            "experts: {quantization: int3}",
            r"experts\.quantization: .*'none', 'int8', 'int4', 'fp8', 'w8a8' or 'w4a8' \(given 'int3'\)",
        ),
        ("check_weights: maybe", r"check_weights: .*boolean.* \(given 'maybe'\)"),
        ("model: ''", r"model: .*at least 1 character"),
        ("dtype: int3", r"dtype: .*'auto', 'float32'.* \(given 'int3'\)"),
        ("attention: {kv_memory: 3 bananas}", r"attention\.kv_memory: .*512MiB.*\(given '3 bananas'\)"),
        ("attention: {kv_memory: car}", r"attention\.kv_memory: .*1\.5GB, or auto \(given 'car'\)"),
        ("attention: {kv_memory: 0}", r"attention\.kv_memory: .*greater than or equal to 1 \(given 0\)"),
        ("attention: {kv_memory: null}", r"attention\.kv_memory: write a size like 2GiB, or auto"),
        ("attention: {kv_memory_share: 0}", r"attention\.kv_memory_share: .*greater than 0"),
        ("attention: {max_gap: 0.9}", r"attention\.max_gap: .*more than 1, or 0 for no bound \(given 0\.9\)"),
        ("attention: {micro_batches: 9}", r"attention\.micro_batches: .*less than or equal to 8"),
        ("attention: {batch_patience_s: -1}", r"attention\.batch_patience_s: .*greater than or equal to 0"),
        ("gateway: {port: 70000}", r"gateway\.port: .*65535"),
        ("attention: {token_budget: 8}", r"attention: .*token_budget is 8, must be at least max_running \(64\)"),
        ("attention: 3", r"attention: "),
        ("gateway: {port: 1}\nmodel: x\ngateway: {}", r"the key 'gateway' comes twice\s+in .*line 3"),
        ("gateway: {port: 8000}", r"^\S+: gateway\.http_port: 8000, but gateway\.port has it"),
        ("gateway: {metrics_port: 9, health_port: 9}", r"gateway\.metrics_port: 9, but gateway\.health_port has it"),
        ("gateway: {http_port: -1}", r"gateway\.http_port: .*greater than or equal to 0"),
        ("telemetry: {otlp_endpoint: 'collector:4318'}", r"telemetry\.otlp_endpoint: .*pattern"),
        ("telemetry: {trace_ratio: 2}", r"telemetry\.trace_ratio: .*less than or equal to 1"),
        ("telemetry: {log_format: xml}", r"telemetry\.log_format: .*'text' or 'json'"),
        ("gateway: {host: ''}", r"gateway\.host: .*at least 1 character"),
        ("gateway: {tls: {certificate: /c}}", r"gateway\.tls\.key: Field required"),
        ("gateway: {tls: {cert: /c}}", r"gateway\.tls\.cert: unknown key; allowed here: certificate, client_ca, key"),
        ("data_plane: {tls: {certificate: /c, key: /k}}", r"data_plane\.tls\.ca: Field required"),
        ("data_plane: {tls: {cert: /c}}", r"data_plane\.tls\.cert: unknown key; allowed here: ca, certificate, key"),
        ("access: {token: []}", r"access\.token: unknown key; allowed here: tokens"),
        (tokens("token: x"), r"access\.tokens\.0\.token: unknown key; allowed here: role, sha256, share, tenant"),
        (tokens("role: root"), r"access\.tokens\.0\.role: .*'user' or 'admin' \(given 'root'\)"),
        (tokens("share: 0"), r"access\.tokens\.0\.share: .*greater than or equal to 0\.001 \(given 0\)"),
        (tokens("share: .inf"), r"access\.tokens\.0\.share: .*finite number \(given inf\)"),
        (tokens("tenant: a/b"), r"access\.tokens\.0\.tenant: .*\(given 'a/b'\)"),
        (tokens("tenant: ''"), r"access\.tokens\.0\.tenant: "),
        (tokens(f"tenant: {'a' * 65}"), r"access\.tokens\.0\.tenant: "),
        (tokens("share: 1", f"sha256: {'F' * 64}"), r"access: .*tokens\.1\.sha256: the same token as tokens\.0"),
        (
            tokens("share: 1", f"share: 2, sha256: {'A' * 64}"),
            r"access: .*tokens\.1\.share: 2 for tenant 'acme', but tokens\.0 gives it 1; a tenant has one share",
        ),
        ("transport: nccl", r"server\.yaml: transport: nccl needs device: cuda$"),
        ("attention: {gpus: 1}", r"attention\.gpus: 1, but device is cpu; write device: cuda, or leave it out$"),
        ("device: cuda\nexperts: {gpus: 2}", r"experts\.gpus: .*less than or equal to 1"),
        ("device: gpu", "device: .*'cpu' or 'cuda'"),
        (
            "{transport: nccl, device: cuda, experts: {gpus: 0.5}}",
            r"experts\.gpus: 0\.5; transport: nccl needs 1, as its members share no GPU$",
        ),
        ("- model", "expected keys with values, found list"),
        ("model: [", "not valid YAML"),
    ],
)
def test_errors_name_the_key_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        tokens("sha256: emt_secret"),
        tokens(f"sha256: emt_secret{'0' * 54}"),
        "access: emt_secret",
        "access: {tokens: emt_secret}",
        "access: {tokens: [emt_secret]}",
        "access: {tokens: {emt_secret: 1}}",
        "access: [emt_secret]",
    ],
)
def test_a_token_where_its_hash_belongs_is_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"access[^:]*: ") as refused:
        load_config(written(tmp_path, text))
    assert "secret" not in str(refused.value)


def test_a_tenant_may_change_its_token_while_the_old_one_is_good(tmp_path: Path) -> None:
    new = f"sha256: {'A1' * 32}, share: 0.5"
    config = load_config(written(tmp_path, tokens("share: 0.5", new)))
    assert [token.sha256 for token in config.access.tokens] == ["f" * 64, "a1" * 32]


def test_tls_files_are_where_the_server_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor has another working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    tls = load_config(written(tmp_path, "gateway: {tls: {certificate: a.pem, key: ~/b.pem}}")).gateway.tls
    assert tls is not None
    assert (tls.certificate, tls.key, tls.client_ca) == (tmp_path / "a.pem", Path("/home/me/b.pem"), None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_flags_meet_a_file_with_the_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gateway: "):
        load_config(written(tmp_path, "gateway: 7"), {"gateway.port": 1})


def test_the_file_is_not_blamed_for_a_flag(tmp_path: Path) -> None:
    file = written(tmp_path, "experts: {shards: 2, slots: -1}")
    with pytest.raises(ConfigError) as refused:
        load_config(file, {"experts.quantization": "int3"})
    slots, flag = str(refused.value).split("; ")
    assert slots.startswith(f"{file}: experts.slots: ")
    assert flag.startswith("experts.quantization: ")
    with pytest.raises(ConfigError, match=rf"^{file}: experts\.quantization: .*'int3'"):
        load_config(written(tmp_path, "experts: {quantization: int3}"), {"model": "default"})


def test_what_a_flag_and_the_file_say_together(tmp_path: Path) -> None:
    file = written(tmp_path, "gateway: {http_port: 7000}")
    with pytest.raises(ConfigError, match=rf"^{file} and flags: gateway\.http_port: 7000, but gateway\.port has it"):
        load_config(file, {"gateway.port": 7000})
    with pytest.raises(ConfigError, match=rf"^{file}: gateway: "):
        load_config(written(tmp_path, "gateway: 7"), {"gateway.port": 1})


def test_importing_it_is_light() -> None:
    """The configuration is read by tools that have neither torch nor Ray at hand."""
    code = "import sys, cluster.config; sys.exit(bool({'torch', 'ray', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
