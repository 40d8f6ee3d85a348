"""The examples of docs/clients.md, carried out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.access import token_hash
from cluster.config import ServerConfig
from cluster.gateway.settings import Doors
from cluster.launch import running_cluster
from tests.authority import Authority

Local = Callable[..., ServerConfig]
PAGE = Path(__file__).parents[3] / "docs" / "clients.md"


def examples(language: str, host: str) -> list[str]:
    """The blocks of the page that talk to ``host``."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found = [block for block in blocks if host in block]
    assert found
    return found


def carried_out(command: list[str], example: str, host: str, doors: Doors, folder: Path) -> str:
    """What an example prints, with the cluster at hand in the place of the page's."""
    example = example.replace(f"{host}:8000", doors.http).replace(f"{host}:50051", doors.grpc)
    result = subprocess.run([*command, example], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


PYTHON = [sys.executable, "-c"]
SHELL = ["bash", "-ec"]


def test_the_examples(checkpoint: tuple[Path, Any], local: Local, tmp_path: Path) -> None:
    with running_cluster(local(checkpoint[0])) as doors:
        for example in examples("python", "127.0.0.1"):
            assert carried_out(PYTHON, example, "127.0.0.1", doors, tmp_path)
        if shutil.which("curl"):
            for example in examples("bash", "127.0.0.1"):
                printed = carried_out(SHELL, example, "127.0.0.1", doors, tmp_path)
                assert '"object":"list"' in printed
                assert '"chat.completion"' in printed
                assert printed.endswith("data: [DONE]\n\n")


def test_the_examples_with_tls_and_tokens(checkpoint: tuple[Path, Any], local: Local, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    (tmp_path / "ca.pem").write_bytes(authority.certificate.read_bytes())
    (tmp_path / "acme.token").write_text("emt_the-token\n")
    pair = authority.sign("127.0.0.1")
    tokens = [{"sha256": token_hash("emt_the-token"), "tenant": "acme"}]
    tls = {"certificate": str(pair.certificate), "key": str(pair.key)}
    questions = [
        "print(client.models.list())",
        "from expertmesh.v1 import inference_pb2 as pb, inference_pb2_grpc\n"
        "print(inference_pb2_grpc.InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest()))",
    ]
    with running_cluster(local(checkpoint[0], **{"gateway.tls": tls, "access.tokens": tokens})) as doors:
        for example, question in zip(examples("python", "gateway.example"), questions, strict=True):
            assert carried_out(PYTHON, f"{example}\n{question}", "gateway.example", doors, tmp_path)
        if shutil.which("curl"):
            (example,) = examples("bash", "gateway.example")
            assert '"object":"list"' in carried_out(SHELL, example, "gateway.example", doors, tmp_path)
