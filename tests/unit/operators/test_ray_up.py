"""The files for `ray up`, as far as Ray checks them before it touches a machine.

Left out, as they ask a cloud or a machine: of AWS the bootstrap (roles, key pair, subnets, security group, image; it
needs boto3 and credentials), and of both providers everything over SSH.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray._private.label_utils import parse_node_labels_string, validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.access import refuse_open_door
from cluster.config import AttentionConfig, ConfigError, ExpertsConfig, ServerConfig, load_config
from tests.manifests.commands import script_problems
from tests.manifests.documents import read_yaml

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "cluster" / "ray"
ROLE = "expertmesh.io/role"
SERVES = {"local": "serve.yaml", "aws": "serve-gpu.yaml"}


def cluster_file(name: str) -> dict[str, Any]:
    (tree,) = read_yaml(FOLDER / f"{name}.yaml")
    assert isinstance(tree, dict)
    return tree


def server(name: str) -> ServerConfig:
    return load_config(FOLDER / SERVES[name])


@pytest.mark.parametrize("name", SERVES)
def test_ray_takes_the_file(name: str) -> None:
    prepared = prepare_config(cluster_file(name))
    validate_config(prepared)
    commands = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in prepared["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", SERVES)
def test_ray_refuses_a_misspelt_key(name: str) -> None:
    tree = cluster_file(name)
    tree["head_start_ray_comands"] = tree.pop("head_start_ray_commands")
    with pytest.raises(Exception, match="head_start_ray_comands"):
        validate_config(prepare_config(tree))


@pytest.mark.parametrize("name", SERVES)
def test_what_is_mounted_is_there(name: str) -> None:
    mounts = cluster_file(name)["file_mounts"]
    local = [path for path in mounts.values() if not path.startswith("~")]
    assert all((ROOT / path).exists() for path in local)
    assert [remote for remote in mounts if remote.endswith(".ray/auth_token")]
    sent = [remote for remote, path in mounts.items() if (FOLDER / SERVES[name]).is_relative_to(ROOT / path)]
    assert len(sent) >= 1


def test_of_the_checkout_only_what_is_installed_is_sent() -> None:
    """Keys and tokens may lie in its root. To leave them out by pattern would keep `ray rsync-up` from sending any."""
    tree = cluster_file("local")
    mounts = {r: path for r, path in tree["file_mounts"].items() if r.startswith("~/expertmesh/source/")}
    assert {remote.removeprefix("~/expertmesh/source/") for remote in mounts} == set(mounts.values())
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(mounts.values()) == {source for line in copied for source in line.split()}
    others = tree["file_mounts"].items() - mounts.items()
    assert {path for _, path in others} == {"cluster/ray/serve.yaml", "~/.ray/auth_token"}
    assert tree["rsync_exclude"] == ["**/__pycache__"]
    (install,) = [command for command in tree["setup_commands"] if "constraints.txt" in command]
    assert install.startswith("cd ~/expertmesh/source && rm -rf build && ")


def test_in_a_container_the_configuration_is_a_folder() -> None:
    """Docker mounts a single file as the one that it was: rsync puts another in its place, which nobody sees."""
    mounts = cluster_file("aws")["file_mounts"]
    assert {remote for remote, path in mounts.items() if not (ROOT / path).is_dir()} == {
        "/home/expertmesh/.ray/auth_token"  # the page says what another one takes
    }
    assert not {path.suffix for path in FOLDER.iterdir()} - {".yaml"}
    page = (ROOT / "docs/deploy.md").read_text()
    assert f"`~/config/{SERVES['aws']}`" in page
    assert "/home/expertmesh/config" in mounts


@pytest.mark.parametrize("name", [".gitignore", ".dockerignore"])
def test_keys_and_tokens_are_left_out(name: str) -> None:
    lines = {line.removeprefix("**/") for line in (ROOT / name).read_text().splitlines()}
    assert lines >= {"*.key", "*.pem", "*.crt", "*.token", "*.entry"}


def test_the_page_keeps_keys_and_tokens_out_of_the_checkout() -> None:
    page = (ROOT / "docs/deploy.md").read_text()
    commands = "".join(re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    named = re.findall(r"[^\s=]*\.(?:token|entry|pem|key)\b", commands)
    assert len(named) > 8
    assert [path for path in named if not path.startswith("$KEYS/") and "~/expertmesh/tls.key" not in path] == []


@pytest.mark.parametrize("name", SERVES)
def test_every_command_is_a_shell_s_and_the_program_s(name: str) -> None:
    tree = cluster_file(name)
    for key, commands in tree.items():
        if key.endswith("_commands"):
            for command in commands:
                subprocess.run(["bash", "-n", "-c", command], check=True)
                assert list(script_problems(key, command)) == []


@pytest.mark.parametrize("name", SERVES)
def test_the_server_s_door_is_shut_until_there_are_tokens(name: str) -> None:
    with pytest.raises(ConfigError, match=r"access\.tokens not set"):
        refuse_open_door(server(name))
    refuse_open_door(with_a_token(name))


def with_a_token(name: str) -> ServerConfig:
    return load_config(FOLDER / SERVES[name], {"access.tokens": [{"sha256": "0" * 64, "tenant": "example"}]})


def test_the_fleets_of_aws_fit_their_machines() -> None:
    types, config = cluster_file("aws")["available_node_types"], server("aws")
    assert types["head"]["resources"] == {"CPU": 0}
    fleets: dict[str, tuple[AttentionConfig | ExpertsConfig, int]] = {
        "attention": (config.attention, config.attention.replicas),
        "experts": (config.experts, config.experts.shards),
    }
    for name, (fleet, count) in fleets.items():
        (kind,) = [kind for kind in types.values() if fleet.node_labels.items() <= kind["labels"].items()]
        assert kind is types[name]
        room = min(kind["resources"]["CPU"] // fleet.cpus, kind["resources"]["GPU"] // fleet.gpus)
        assert count <= room * kind["min_workers"]
        assert kind["resources"].keys() <= {"CPU", "GPU"}
    assert config.experts.min_replicas <= types["experts"]["min_workers"]
    assert sum(kind["max_workers"] for kind in types.values()) == cluster_file("aws")["max_workers"]


def test_a_machine_learns_its_role_from_its_address(tmp_path: Path) -> None:
    """The start command itself, with a `ray` and a `hostname` that only tell what they were asked."""
    tree, config = cluster_file("local"), server("local")
    provider = tree["provider"]
    roles = {
        address: started_with(tree["worker_start_ray_commands"][-1], address, tmp_path)
        for address in provider["worker_ips"]
    }
    assert roles == {"10.0.0.11": "attention", "10.0.0.12": "experts", "10.0.0.13": "experts"}
    assert started_with(tree["head_start_ray_commands"][-1], provider["head_ip"], tmp_path) == "gateway"
    assert config.attention.node_labels == {ROLE: "attention"}
    assert config.experts.node_labels == {ROLE: "experts"}
    assert list(roles.values()).count("experts") >= config.experts.min_replicas


def started_with(command: str, address: str, folder: Path) -> str:
    """The role in the labels of ``ray start``."""
    tools = folder / "expertmesh" / "venv" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for name, text in (("ray", 'printf "%s\\n" "$@"'), ("hostname", f'echo "{address} fd00::1 "')):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {"HOME": str(folder), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "10.0.0.10"}
    # the limit of open files is the machine's: the test's own must not be touched, nor matter
    script = command.replace("ulimit -n 65536;", "")
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    (labels,) = [word.removeprefix("--labels=") for word in done.stdout.split() if word.startswith("--labels=")]
    parsed = parse_node_labels_string(labels)
    validate_node_labels(parsed)
    assert set(parsed) == {ROLE}
    return str(parsed[ROLE])
