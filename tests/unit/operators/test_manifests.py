"""The manifests pass their checker; and the checker fails on each thing that it is there to find."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.manifests.check import check
from tests.manifests.documents import read_yaml

ROOT = Path(__file__).parents[3]

(BROKEN,) = read_yaml(Path(__file__).with_name("broken_manifests.yaml"))


def test_the_manifests_are_in_order() -> None:
    report = check(ROOT / "k8s")
    assert report.problems == ()
    assert report.documents > 50


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "k8s", tmp_path / "k8s"))


@pytest.mark.parametrize("case", BROKEN)
def test_a_manifest_is_refused_for(case: str, manifests: Path) -> None:
    file, old, new, complaint = BROKEN[case]
    text = (manifests / file).read_text()
    assert old is None or old in text
    (manifests / file).write_text(new if old is None else text.replace(old, new))
    problems = check(manifests).problems
    assert any(complaint in problem for problem in problems), problems


def test_nothing_to_check_is_a_failure(tmp_path: Path) -> None:
    assert check(tmp_path).problems == (f"{tmp_path}: nothing to check",)


def test_an_additional_file_is_an_orphan(manifests: Path) -> None:
    (manifests / "overlays/cpu/notes.txt").write_text("left behind")
    assert check(manifests).problems == (f"{manifests}/overlays/cpu/notes.txt: no kustomization uses it",)
