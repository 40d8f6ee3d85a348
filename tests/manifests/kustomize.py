"""What ``kubectl apply -k`` would send, for the part of Kustomize that the overlays use. What it does not know it
refuses: better no answer than another one than kubectl's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from tests.manifests.documents import Document, ManifestError, name_of, read_manifests, read_yaml
from tests.manifests.json_patch import apply_patch

FILE_NAME = "kustomization.yaml"
_CLUSTER_WIDE = {"Namespace"}


def _strict(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "uniqueItems": True}


_TEXT = {"type": "string", "minLength": 1}
_SCHEMA = _strict(
    ["apiVersion", "kind", "namespace", "resources"],
    apiVersion={"const": "kustomize.config.k8s.io/v1beta1"},
    kind={"const": "Kustomization"},
    namespace=_TEXT,
    resources=_list(_TEXT),
    images=_list(_strict(["name", "newName", "newTag"], name=_TEXT, newName=_TEXT, newTag=_TEXT)),
    configMapGenerator=_list(
        _strict(["name", "files"], name=_TEXT, behavior={"enum": ["create", "merge", "replace"]}, files=_list(_TEXT))
    ),
    generatorOptions=_strict(["disableNameSuffixHash"], disableNameSuffixHash={"const": True}),
    patches=_list(_strict(["target", "path"], target=_strict(["kind", "name"], kind=_TEXT, name=_TEXT), path=_TEXT)),
)


@dataclass(frozen=True)
class Rendered:
    """``documents`` in the order of their resources; ``files``: all that were read, resolved."""

    folder: Path
    documents: tuple[Document, ...]
    files: frozenset[Path]


def render(folder: Path) -> Rendered:
    """Read ``folder``/kustomization.yaml and what it names. Raises ManifestError."""
    path = folder / FILE_NAME
    found = read_yaml(path)
    if len(found) != 1:
        raise ManifestError(f"{path}: {len(found)} documents, expected one")
    _check_schema(path, found[0])
    tree = found[0]
    documents, files = _resources(folder, tree["resources"])
    files |= {path.resolve()}
    if "configMapGenerator" in tree and "generatorOptions" not in tree:
        raise ManifestError(f"{path}: configMapGenerator needs generatorOptions.disableNameSuffixHash")
    for generator in tree.get("configMapGenerator", []):
        files |= _generate(path, documents, generator)
    for patch in tree.get("patches", []):
        files |= _patch(path, documents, patch)
    for document in documents:
        if document["kind"] not in _CLUSTER_WIDE:
            document["metadata"]["namespace"] = tree["namespace"]
        elif document["metadata"]["name"] != tree["namespace"]:
            raise ManifestError(f"{path}: {name_of(document)} is not the namespace {tree['namespace']!r}")
    for image in tree.get("images", []):
        _replace_image(path, documents, image)
    return Rendered(folder, tuple(documents), frozenset(files))


def _check_schema(path: Path, tree: Any) -> None:
    for error in jsonschema.Draft7Validator(_SCHEMA).iter_errors(tree):
        where = ".".join(map(str, error.absolute_path)) or "top level"
        raise ManifestError(f"{path}: {where}: {error.message}")


def _resources(folder: Path, names: list[str]) -> tuple[list[Document], set[Path]]:
    documents: list[Document] = []
    files: set[Path] = set()
    for name in names:
        path = folder / name
        if path.is_dir():
            below = render(path)
            documents += below.documents
            files |= below.files
        else:
            documents += read_manifests(path)
            files.add(path.resolve())
    names_seen: set[str] = set()
    for document in documents:
        if name_of(document) in names_seen:
            raise ManifestError(f"{folder / FILE_NAME}: {name_of(document)} comes twice")
        names_seen.add(name_of(document))
    return documents, files


def _generate(path: Path, documents: list[Document], generator: dict[str, Any]) -> set[Path]:
    name, behavior = generator["name"], generator.get("behavior", "create")
    files = {path.parent / file for file in generator["files"]}
    for file in files:
        if not file.is_file():
            raise ManifestError(f"{path}: configMapGenerator.{name}: no file {file}")
    data = {file.name: file.read_text(encoding="utf-8") for file in files}
    there = [d for d in documents if name_of(d) == f"ConfigMap/{name}"]
    if bool(there) == (behavior == "create"):
        raise ManifestError(f"{path}: configMapGenerator.{name}: behavior {behavior}, but it is {_there(there)}")
    if not there:
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
    elif behavior == "merge":
        there[0]["data"] = there[0]["data"] | data
    else:
        there[0]["data"] = data
    return {file.resolve() for file in files}


def _there(found: list[Document]) -> str:
    return "there already" if found else "not there"


def _patch(path: Path, documents: list[Document], patch: dict[str, Any]) -> set[Path]:
    wanted = f"{patch['target']['kind']}/{patch['target']['name']}"
    file = path.parent / patch["path"]
    indices = [index for index, document in enumerate(documents) if name_of(document) == wanted]
    if not indices:
        raise ManifestError(f"{path}: patches: no {wanted} for {patch['path']}")
    operations = read_yaml(file)
    try:
        if len(operations) != 1:
            raise ManifestError(f"{len(operations)} documents, expected one")
        documents[indices[0]] = apply_patch(documents[indices[0]], operations[0])
    except ManifestError as error:
        raise ManifestError(f"{file}: {error}") from None
    return {file.resolve()}


def _replace_image(path: Path, documents: list[Document], image: dict[str, str]) -> None:
    """Wherever there are containers, at any depth, as Kustomize does it."""
    new, found = f"{image['newName']}:{image['newTag']}", False
    for container in _containers(documents):
        if str(container.get("image", "")).split(":")[0] == image["name"]:
            container["image"], found = new, True
    if not found:
        raise ManifestError(f"{path}: images: nothing uses {image['name']!r}")


def _containers(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, list | tuple):
        for item in node:
            yield from _containers(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                yield from value
            else:
                yield from _containers(value)
