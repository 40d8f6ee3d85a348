"""The page for those who deploy says what is so."""

from __future__ import annotations

import re
from pathlib import Path

from tests.manifests.commands import script_problems
from tests.manifests.secrets import SECRET_KEYS
from tests.manifests.security import OPERATOR_MADE

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "deploy.md").read_text()


def test_every_command_line_is_one_that_the_program_takes() -> None:
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert sum(block.count("expertmesh serve") for block in blocks) == 1
    assert sum(line.startswith("expertmesh ") for block in blocks for line in block.splitlines()) >= 3
    assert [problem for block in blocks for problem in script_problems("deploy.md", block)] == []


def test_a_command_line_in_quotes_is_looked_at_too() -> None:
    (problem,) = script_problems("here", "ray job submit -- 'expertmesh serve --cfg ~/serve.yaml'")
    assert "No such option: --cfg" in problem


def test_what_operators_have_to_make_is_told() -> None:
    assert [name for _, name in OPERATOR_MADE if f"`{name}`" not in PAGE] == []


def test_every_key_of_the_secrets_is_made_by_the_commands_of_the_page() -> None:
    made = {name: set(re.findall(r"--from-file=([\w.]+)=", line)) for name, line in _secrets()}
    assert re.search(r"create secret tls expertmesh-tls --cert=\S+ --key=\S+", PAGE)
    assert made | {"expertmesh-tls": {"tls.crt", "tls.key"}} == SECRET_KEYS


def _secrets() -> list[tuple[str, str]]:
    return re.findall(r"create secret generic (\S+) (.*)", PAGE)


def test_every_folder_that_is_named_is_there() -> None:
    named = set(re.findall(r"k8s/[a-z/]+[a-z]", PAGE))
    assert named >= {f"k8s/{name}" for name in ("overlays/cpu", "overlays/gpu", "overlays/mesh", "batch", "monitoring")}
    assert [path for path in named if not (ROOT / path).exists() and not (ROOT / f"{path}.yaml").exists()] == []
    linked = re.findall(r"\]\((\.\./[^)#]+)\)", PAGE)
    assert [path for path in linked if not (ROOT / "docs" / path).exists()] == []
