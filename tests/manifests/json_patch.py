"""JSON Patch (RFC 6902), as far as the overlays use it: add, replace, remove, test."""

from __future__ import annotations

import copy
from typing import Any

from tests.manifests.documents import ManifestError

_KEYS = {
    "add": {"op", "path", "value"},
    "replace": {"op", "path", "value"},
    "remove": {"op", "path"},
    "test": {"op", "path", "value"},
}


def apply_patch(document: Any, operations: Any) -> Any:
    """A patched copy of ``document``. Raises ManifestError for an operation that is unknown or does not apply."""
    if not isinstance(operations, list):
        raise ManifestError(f"a patch is a list of operations, not a {type(operations).__name__}")
    patched = copy.deepcopy(document)
    for operation in operations:
        _apply(patched, operation)
    return patched


def _apply(document: Any, operation: Any) -> None:
    op = operation.get("op") if isinstance(operation, dict) else None
    if op not in _KEYS or set(operation) != _KEYS[op]:
        raise ManifestError(f"{operation!r}: allowed are {', '.join(_KEYS)}, each with path, all but remove with value")
    path = operation["path"]
    *above, last = _tokens(path)
    parent = document
    for token in above:
        parent = _child(parent, token, path)
    if op == "add":
        _add(parent, last, copy.deepcopy(operation["value"]), path)
        return
    found = _child(parent, last, path)
    key = int(last) if isinstance(parent, list) else last
    if op == "remove":
        del parent[key]
    elif op == "replace":
        parent[key] = copy.deepcopy(operation["value"])
    elif found != operation["value"]:
        raise ManifestError(f"test {path}: {found!r}, expected {operation['value']!r}")


def _tokens(path: Any) -> list[str]:
    if not isinstance(path, str) or not path.startswith("/"):
        raise ManifestError(f"path {path!r}: must begin with /")
    return [token.replace("~1", "/").replace("~0", "~") for token in path[1:].split("/")]


def _child(parent: Any, token: str, path: str) -> Any:
    if isinstance(parent, dict) and token in parent:
        return parent[token]
    if isinstance(parent, list) and token.isdecimal() and int(token) < len(parent):
        return parent[int(token)]
    raise ManifestError(f"path {path}: nothing at {token!r}")


def _add(parent: Any, token: str, value: Any, path: str) -> None:
    if isinstance(parent, dict):
        parent[token] = value
    elif isinstance(parent, list) and token == "-":
        parent.append(value)
    elif isinstance(parent, list) and token.isdecimal() and int(token) <= len(parent):
        parent.insert(int(token), value)
    else:
        raise ManifestError(f"path {path}: cannot add at {token!r}")
