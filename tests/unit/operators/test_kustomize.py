"""The renderer and its patches, by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.manifests.documents import ManifestError
from tests.manifests.json_patch import apply_patch
from tests.manifests.kustomize import render

HEAD = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: ns\n"
CONFIG_MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: here}\ndata: {key: value}\n"


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ({"op": "add", "path": "/a/-", "value": 3}, {"a": [1, 2, 3], "b/c": 0}),
        ({"op": "add", "path": "/a/0", "value": 3}, {"a": [3, 1, 2], "b/c": 0}),
        ({"op": "add", "path": "/d", "value": {}}, {"a": [1, 2], "b/c": 0, "d": {}}),
        ({"op": "replace", "path": "/b~1c", "value": 1}, {"a": [1, 2], "b/c": 1}),
        ({"op": "remove", "path": "/a/0"}, {"a": [2], "b/c": 0}),
        ({"op": "test", "path": "/a/1", "value": 2}, {"a": [1, 2], "b/c": 0}),
    ],
)
def test_a_patch(operation: dict[str, Any], expected: dict[str, Any]) -> None:
    document = {"a": [1, 2], "b/c": 0}
    assert apply_patch(document, [operation]) == expected
    assert document == {"a": [1, 2], "b/c": 0}


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "move", "from": "/a", "path": "/b"},
        {"op": "add", "path": "/a/5", "value": 1},
        {"op": "add", "path": "/x/y", "value": 1},
        {"op": "replace", "path": "/x", "value": 1},
        {"op": "remove", "path": "/a/2"},
        {"op": "remove", "path": "/a/-1"},
        {"op": "remove", "path": "a"},
        {"op": "replace", "path": "/a"},
        {"op": "test", "path": "/a/0", "value": 2},
        {"op": "remove", "path": "/a", "valu": 1},
        "remove",
    ],
)
def test_a_patch_is_refused(operation: Any) -> None:
    with pytest.raises(ManifestError):
        apply_patch({"a": [1, 2]}, [operation])


def test_a_base_and_its_overlay(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.mkdir()
    overlay.mkdir()
    (base / "pod.yaml").write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n"
        "spec: {deep: [{containers: [{image: app:1}, {image: other:1}], initContainers: [{image: app}]}]}\n"
    )
    (base / "a.txt").write_text("base")
    (base / "b.txt").write_text("base")
    generator = "configMapGenerator:\n- {name: c, files: [a.txt, b.txt]}\n"
    options = "generatorOptions: {disableNameSuffixHash: true}\n"
    (base / "kustomization.yaml").write_text(HEAD + "resources: [pod.yaml]\n" + generator + options)
    (overlay / "a.txt").write_text("overlay")
    (overlay / "patch.yaml").write_text("[{op: add, path: /spec/more, value: 1}]")
    (overlay / "kustomization.yaml").write_text(
        HEAD
        + "resources: [../base]\n"
        + "configMapGenerator:\n- {name: c, behavior: merge, files: [a.txt]}\n"
        + options
        + "patches:\n- {target: {kind: Pod, name: p}, path: patch.yaml}\n"
        + "images:\n- {name: app, newName: registry:5000/app, newTag: '2'}\n"
    )
    pod, config = render(overlay).documents
    assert pod["metadata"] == {"name": "p", "namespace": "ns"}
    assert pod["spec"]["more"] == 1
    images = {"containers": [{"image": "registry:5000/app:2"}, {"image": "other:1"}]}
    assert pod["spec"]["deep"] == [images | {"initContainers": [{"image": "registry:5000/app:2"}]}]
    assert config["data"] == {"a.txt": "overlay", "b.txt": "base"}
    assert {path.name for path in render(overlay).files} >= {"a.txt", "b.txt", "pod.yaml", "patch.yaml"}


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        ("resources: [here.yaml]\ncommonLabels: {a: b}\n", "commonLabels"),
        ("resources: [here.yaml, here.yaml]\n", "non-unique"),
        ("resources: [here.yaml, also.yaml]\n", "ConfigMap/here comes twice"),
        ("resources: []\n", "resources"),
        ("resources: [here.yaml]\nconfigMapGenerator: [{name: here, files: [here.yaml]}]\n", "disableNameSuffixHash"),
        ("resources: [https://example.com/x]\n", "cannot be read"),
        ("resources: [namespace.yaml]\n", "is not the namespace"),
        (
            "resources: [here.yaml]\nconfigMapGenerator: [{name: here, files: [here.yaml]}]\n"
            "generatorOptions: {disableNameSuffixHash: true}\n",
            "behavior create, but it is there already",
        ),
        (
            "resources: [here.yaml]\nconfigMapGenerator: [{name: gone, behavior: merge, files: [here.yaml]}]\n"
            "generatorOptions: {disableNameSuffixHash: true}\n",
            "behavior merge, but it is not there",
        ),
    ],
)
def test_what_the_renderer_does_not_know_is_refused(tmp_path: Path, rest: str, complaint: str) -> None:
    (tmp_path / "here.yaml").write_text(CONFIG_MAP)
    (tmp_path / "also.yaml").write_text(CONFIG_MAP)
    (tmp_path / "namespace.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: other}\n")
    (tmp_path / "kustomization.yaml").write_text(HEAD + rest)
    with pytest.raises(ManifestError, match=complaint):
        render(tmp_path)
