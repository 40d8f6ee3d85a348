"""What processes load before they have anything to do: torch alone takes a second of a core and 150 MB."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cluster.gateway.server", ("torch", "transformers")),
        ("cluster.ray_fleet", ("torch", "transformers", "cluster.gateway.server")),
        ("cluster.cli.main", ("torch", "ray", "grpc")),
        ("cluster.inspection", ("torch", "ray")),
        ("cluster.hosted", ("torch", "cluster.controller", "grpc")),
        ("actors.router", ("actors.attention", "actors.expert", "ray")),
    ],
)
def test_a_process_loads_what_it_needs(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
