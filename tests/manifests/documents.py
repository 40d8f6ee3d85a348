"""YAML files of manifests, read as strictly as they will be: a key given twice or an empty document is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]


class ManifestError(ValueError):
    """A manifest cannot be used; the message names the file, the place, and what is allowed."""


class _UniqueKeys(yaml.CSafeLoader):
    """PyYAML takes the last of two equal keys without a word. (C: the wheels have it, and it is ten times faster.)"""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See yaml."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            if key.value != "<<":  # the merge of an anchor may come more than once
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> list[Any]:
    """Every document of a file. Raises ManifestError for what is not YAML and for a document without content."""
    try:
        found = list(yaml.load_all(path.read_text(encoding="utf-8"), _UniqueKeys))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: not valid YAML: {error}") from None
    if not found or any(document is None for document in found):
        raise ManifestError(f"{path}: an empty document")
    return found


def read_manifests(path: Path) -> list[Document]:
    """As ``read_yaml``, where each document has to name its kind and itself."""
    documents = read_yaml(path)
    for document in documents:
        if not isinstance(document, dict):
            raise ManifestError(f"{path}: a {type(document).__name__} where a manifest is expected")
        metadata = document.get("metadata")
        named = isinstance(metadata, dict) and isinstance(metadata.get("name"), str)
        if not named or not all(isinstance(document.get(key), str) for key in ("apiVersion", "kind")):
            raise ManifestError(f"{path}: a manifest needs apiVersion, kind and metadata.name")
    return documents


def name_of(document: Document) -> str:
    """ "Kind/name", for messages."""
    return f"{document['kind']}/{document['metadata']['name']}"
