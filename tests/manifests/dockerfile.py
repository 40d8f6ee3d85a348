"""What can be said of a Dockerfile without Docker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.manifests.documents import ManifestError

FINAL_STAGES = ("cuda", "cpu")


@dataclass(frozen=True)
class Stage:
    """``instructions`` in order, as (NAME, the rest in one line); ``base`` is an image, or a stage above."""

    name: str
    base: str
    instructions: tuple[tuple[str, str], ...]


def dockerfile_problems(path: Path) -> Iterator[str]:
    """Bases without a tag, sources that are not there, installs without pins, images that run as root."""
    arguments, stages = _parse(path)
    names = {stage.name for stage in stages}
    ignored = (path.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    for stage in stages:
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], stage.base)
        if stage.base not in names and (":" not in image or image.endswith(":latest")):
            yield f"FROM {image}: needs a tag other than latest, or a digest"
        for name, rest in stage.instructions:
            if name == "COPY" and "--from=" not in rest:
                yield from _copy_problems(path.parent, rest, sent)
            elif name == "RUN":
                yield from _install_problems(stage, rest)
    for name in FINAL_STAGES:
        yield from _final_problems(name, stages)
    if stages[-1].name != FINAL_STAGES[-1]:
        yield f"the last stage is {stages[-1].name}, must be {FINAL_STAGES[-1]}: what `docker build .` makes"


def _parse(path: Path) -> tuple[dict[str, str], list[Stage]]:
    """The arguments above the first stage with their defaults, and the stages."""
    arguments: dict[str, str] = {}
    stages: list[tuple[str, str, list[tuple[str, str]]]] = []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            match = re.fullmatch(r"(\S+) AS (\S+)", rest)
            if match is None:
                raise ManifestError(f"{path}: FROM {rest}: expected FROM BASE AS NAME")
            stages.append((match[2], match[1], []))
        elif stages and name:
            stages[-1][2].append((name, rest))
        elif name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = value
    return arguments, [Stage(name, base, tuple(instructions)) for name, base, instructions in stages]


def _copy_problems(root: Path, rest: str, sent: set[str]) -> Iterator[str]:
    *sources, _ = rest.split()
    for source in sources:
        if not (root / source).exists():
            yield f"COPY {source}: not in the repository"
        if source not in sent:
            yield f"COPY {source}: .dockerignore keeps it out"


def _install_problems(stage: Stage, rest: str) -> Iterator[str]:
    if "pip install" not in rest:
        return
    if "--no-deps" in rest:
        if "==" not in rest:
            yield f"{stage.name}: {rest}: installs without a version"
        return
    wanted = ["-c constraints.txt", "-c docker/constraints-ray.txt"]
    wanted += ["-c constraints-gpu.txt"] if "[gpu]" in rest else []
    for option in wanted:
        if option not in rest:
            yield f"{stage.name}: {rest}: needs {option}"


def _final_problems(name: str, stages: list[Stage]) -> Iterator[str]:
    by_name = {stage.name: stage for stage in stages}
    if name not in by_name:
        yield f"no stage {name}"
        return
    chain = [by_name[name]]
    while chain[-1].base in by_name:
        chain.append(by_name[chain[-1].base])
    last = dict(pair for stage in reversed(chain) for pair in stage.instructions)
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", last.get("USER", "")):
        user = last.get("USER")
        yield f"{name}: USER {user}: must be numbers, as Kubernetes can tell only of those that they are not root"
    if last.get("HEALTHCHECK") != "NONE":
        yield f"{name}: HEALTHCHECK must be NONE: Kubernetes' probes ask the health port"
    if "ENTRYPOINT" in last:
        yield f"{name}: ENTRYPOINT: `ray up` runs IMAGE bash, so there may be none"
