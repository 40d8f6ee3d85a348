"""The script that the gateway's pod runs, with a `ray` and an `expertmesh` that only tell what happens to them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.config import load_config
from tests.manifests.gateway import ACCESS
from tests.waiting import until

ROOT = Path(__file__).parents[3]

RAY = """echo "ray $*" >> {log}
trap 'echo ray ended >> {log}; exit 0' TERM
{then}
while true; do sleep 0.05; done
"""
SOCKET = (
    "python3 -c 'import os, socket, sys; os.chdir(sys.argv[1]); socket.socket(socket.AF_UNIX).bind(sys.argv[2])' "
    "$(dirname {raylet}) $(basename {raylet})"
)
"""Bound from within its folder: a socket's whole path may have 107 bytes, a test's folder alone has more."""
ULIMIT = "ulimit() { return 1; }\n"
"""As where the container runtime allows fewer open files: that is no reason not to serve."""

EXPERTMESH = """echo "expertmesh $*" >> {log}
trap 'echo expertmesh stopped >> {log}; exit 0' TERM
echo serving >> {log}
while true; do sleep 0.05; done
"""


class Pod:
    """A folder in the place of the container's file system, and the script as its first process."""

    def __init__(self, folder: Path, ray_then: str) -> None:
        self.log = folder / "log"
        self.config = folder / "tmp/server.yaml"
        raylet = folder / "tmp/ray/session_latest/sockets/raylet"
        for path in (raylet, folder / "etc/expertmesh/x", folder / "etc/expertmesh-access/x", folder / "bin/x"):
            path.parent.mkdir(parents=True)
        (folder / "etc/expertmesh/server.yaml").write_text((ROOT / "k8s/base/server.yaml").read_text())
        (folder / "etc/expertmesh-access/access.yaml").write_text(ACCESS)
        self._tool(folder, "ray", RAY.format(log=self.log, then=ray_then.format(raylet=raylet)))
        self._tool(folder, "expertmesh", EXPERTMESH.format(log=self.log))
        script = (ROOT / "k8s/base/gateway.sh").read_text()
        script = ULIMIT + re.sub("/(etc|tmp)/", rf"{folder}/\1/", script)
        environment = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "KUBERAY_GEN_RAY_START_CMD": "ray start --address=head:6379 --block --resources='{\"a b\": 1}'",
        }
        # a session of its own: what the script leaves behind can be ended by its group
        self.process = subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True)

    @staticmethod
    def _tool(folder: Path, name: str, text: str) -> None:
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def end(self) -> None:
        """As a container's end: whatever is left is killed."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def ended() -> Iterator[list[Pod]]:
    pods: list[Pod] = []
    yield pods
    for pod in pods:
        pod.end()


def test_serve_starts_beside_ray_and_alone_gets_the_signal(tmp_path: Path, ended: list[Pod]) -> None:
    pod = Pod(tmp_path, SOCKET)
    ended.append(pod)
    until(lambda: "serving" in pod.said())
    assert pod.said() == [
        'ray start --address=head:6379 --block --resources={"a b": 1}',
        f"expertmesh serve --config {pod.config}",
        "serving",
    ]
    config = load_config(pod.config)
    assert [token.tenant for token in config.access.tokens] == ["example"]
    pod.process.send_signal(signal.SIGTERM)
    assert pod.process.wait(10) == 0
    assert pod.said()[-1] == "expertmesh stopped"
    assert "ray ended" not in pod.said()


def test_a_ray_that_cannot_start_ends_it(tmp_path: Path, ended: list[Pod]) -> None:
    pod = Pod(tmp_path, "exit 1")
    ended.append(pod)
    assert pod.process.wait(20) != 0
    assert not [line for line in pod.said() if line.startswith("expertmesh")]


def test_a_signal_while_ray_starts_ends_it(tmp_path: Path, ended: list[Pod]) -> None:
    pod = Pod(tmp_path, "")
    ended.append(pod)
    until(lambda: bool(pod.said()))
    pod.process.send_signal(signal.SIGTERM)
    assert pod.process.wait(20) == 143
    assert not [line for line in pod.said() if line.startswith("expertmesh")]
