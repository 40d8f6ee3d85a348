"""What can be said of a Dockerfile without Docker."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.manifests.documents import ManifestError
from tests.manifests.image import HOME, PROGRAMS, UID

FINAL_STAGES = ("cuda", "cpu")
_TOOLS = {"rsync", "openssh-client"}
"""What `ray up` runs in containers: to copy files in, and on AWS, from the head's, to start the other machines."""
_TORCH_INDEX = "https://download.pytorch.org/whl/"
_LINES = (
    *("apt-get update", "apt-get install --yes --no-install-recommends ", "rm -rf /var/lib/apt/lists/"),
    *(
        "python -m venv ",
        "python -m actors.native",
        'python -c "import actors.transport._ring"',
        "pip install ",
        "groupadd --gid ",
        "useradd --uid ",
        "ln -s ",
        "[ ",
        "grep ",
    ),
)
"""How every command of a RUN has to begin: all that the bases are known to have."""
_EXTRA = {"cuda": ".[gpu]", "cpu": "."}


@dataclass(frozen=True)
class Stage:
    """``instructions`` in order, as (NAME, the rest in one line); ``base`` is an image, or a stage above."""

    name: str
    base: str
    instructions: tuple[tuple[str, str], ...]


def dockerfile_problems(path: Path) -> Iterator[str]:
    """Bases without a tag, sources that are not there, installs without pins, images that lack something or run as
    somebody else than Kubernetes is told."""
    arguments, stages = _parse(path)
    names = {stage.name for stage in stages}
    ignored = (path.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()
    pinned = set((path.parent / "Makefile").read_text(encoding="utf-8").split())
    python = _python(path.parent / "pyproject.toml")
    sent = {line[1:] for line in ignored if line.startswith("!")}
    for stage in stages:
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], stage.base)
        if stage.base not in names and (":" not in image or image.endswith(":latest")):
            yield f"FROM {image}: needs a tag other than latest, or a digest"
        elif stage.base not in names and not re.match(rf"python:{re.escape(python)}(?!\d)|python@sha256:", image):
            yield f"FROM {image}: must be python:{python}, for which constraints.txt was made"
        for name, rest in stage.instructions:
            if name == "COPY" and "--from=" not in rest:
                yield from _copy_problems(path.parent, rest, sent)
            elif name == "COPY" and (source := rest.partition("--from=")[2].split()[0]) not in names:
                yield f"{stage.name}: COPY --from={source}: no such stage"
            elif name == "RUN":
                yield from _command_problems(stage, rest)
                yield from _install_problems(stage, rest, pinned)
    packages = _package_folders(path.parent / "pyproject.toml")
    for name in FINAL_STAGES:
        yield from _final_problems(name, stages)
        yield from _build_problems(name, stages, packages)
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


def _command_problems(stage: Stage, rest: str) -> Iterator[str]:
    for part in re.split(r"&&|\|\||[;|&]|\$\(", rest):
        line = re.sub(r"^(?:(?:if|then|else|fi)(?:\s+|$))*", "", part.strip())
        if line and not line.startswith(_LINES):
            allowed = ", ".join(known.strip() for known in _LINES)
            yield f"{stage.name}: RUN {line}: no known command; known are {allowed}"


def _install_problems(stage: Stage, rest: str, pinned: set[str]) -> Iterator[str]:
    if "pip install" not in rest:
        return
    for requirement in re.findall(r"[\w-]+==[\w.]+", rest):
        if requirement not in pinned:
            yield f"{stage.name}: {requirement}: not what the Makefile installs"
    if "--no-deps" in rest:
        if "==" not in rest:
            yield f"{stage.name}: {rest}: installs without a version"
        return
    wanted = ["-c constraints.txt", "-c docker/constraints-ray.txt"]
    wanted += ["-c constraints-gpu.txt"] if "[gpu]" in rest else []
    for option in wanted:
        if option not in rest:
            yield f"{stage.name}: {rest}: needs {option}"


def _instructions(name: str, stages: list[Stage]) -> list[tuple[str, str]]:
    """Of a stage and of all that it is built on, in order; none if it is not there."""
    by_name = {stage.name: stage for stage in stages}
    found: list[tuple[str, str]] = []
    while name in by_name:
        found = [*by_name[name].instructions, *found]
        name = by_name[name].base
    return found


def _final_problems(name: str, stages: list[Stage]) -> Iterator[str]:
    instructions = _instructions(name, stages)
    if not instructions:
        yield f"no stage {name}"
        return
    last = dict(instructions)
    if last.get("USER") != f"{UID}:{UID}":
        user = last.get("USER")
        yield f"{name}: USER {user}: must be {UID}:{UID}, as the manifests say; of names Kubernetes cannot tell root"
    if f"useradd --uid {UID} --gid {UID} --create-home" not in (runs := _runs(instructions)):
        yield f"{name}: nobody is made with useradd --uid {UID} --gid {UID} --create-home"
    if last.get("WORKDIR") != HOME:
        yield f"{name}: WORKDIR {last.get('WORKDIR')}: must be {HOME}, where the manifests mount a folder"
    if missing := _TOOLS - set(runs.split()):
        yield f"{name}: {', '.join(sorted(missing))} not installed: `ray up` runs it in containers"
    copies = [rest for key, rest in instructions if key == "COPY"]
    if copies != (wanted := [f"--from=build-{name} {PROGRAMS} {PROGRAMS}"]):
        yield f"{name}: COPY {copies}: must be {wanted}"
    if last.get("HEALTHCHECK") != "NONE":
        yield f"{name}: HEALTHCHECK must be NONE: Kubernetes' probes ask the health port"
    if "ENTRYPOINT" in last:
        yield f"{name}: ENTRYPOINT: `ray up` runs IMAGE bash, so there may be none"


def _build_problems(name: str, stages: list[Stage], packages: set[str]) -> Iterator[str]:
    """The stage whose programs the final one gets."""
    instructions = _instructions(f"build-{name}", stages)
    copied = {source for key, rest in instructions if key == "COPY" for source in rest.split()[:-1]}
    if missing := packages - copied:
        yield f"build-{name}: COPY {', '.join(sorted(missing))}: missing; pyproject.toml has its packages"
    installs = [rest for key, rest in instructions if key == "RUN" and "pip install" in rest]
    arguments = dict(rest.split("=", 1) for key, rest in instructions if key == "ARG")
    torch = [rest for rest in installs if "torch" in rest]
    index = re.search(r"--index-url (\S+)", torch[0]) if len(torch) == 1 else None
    found = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], index[1].strip('"')) if index else "PyPI"
    if not found.startswith(_TORCH_INDEX + {"cuda": "cu12", "cpu": "cpu"}[name]):
        yield f"build-{name}: torch comes from {found}; must be PyTorch's own index for {name}"
    wanted = {"ray[default]", _EXTRA[name]}
    words = {word.strip('"') for rest in installs if "--no-deps" not in rest for word in rest.split()}
    if missing := wanted - words:
        yield f"build-{name}: {', '.join(sorted(missing))} not installed"


def _runs(instructions: list[tuple[str, str]]) -> str:
    return " ".join(rest for key, rest in instructions if key == "RUN")


def _python(path: Path) -> str:
    """The oldest Python that pyproject.toml takes: the one that the pins are resolved and tested with."""
    requirement: str = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["requires-python"]
    return requirement.removeprefix(">=")


def _package_folders(path: Path) -> set[str]:
    """The folders at the top that pyproject.toml takes packages from."""
    settings = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["setuptools"]
    return {folder.split("/")[0] for folder in settings["package-dir"].values()}
