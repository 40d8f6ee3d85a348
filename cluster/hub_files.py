"""Which files of a repository make a checkpoint. Names and sizes only: no network, no reading of weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cluster.config import ConfigError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BESIDE_WEIGHTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
"""Patterns of what is wanted beside the weights. Code (*.py) is not among them, whatever ``auto_map`` says."""

PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """``size`` in bytes; ``blob`` is what the cache calls its content."""

    size: int
    blob: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at a commit: its files by name, those in folders of it too."""

    commit: str
    files: Mapping[str, RepoFile]

    @property
    def names(self) -> frozenset[str]:
        """Names of all files."""
        return frozenset(self.files)

    def size(self, names: Collection[str]) -> int:
        """Bytes of these files together."""
        return sum(self.files[name].size for name in names)


def weight_names(names: Collection[str], index: Mapping[str, Any] | None) -> frozenset[str]:
    """The files that hold weights, by the loader's rule; ``index`` is the parsed one if there is one.

    Those that the index names; without one, or beside a model.safetensors that it does not name, that one file; with
    neither, every .safetensors file in the top folder but adapters. A file that the index names need not be in
    ``names``.
    """
    indexed = frozenset((index or {}).get("weight_map", {}).values())
    if SINGLE in names and SINGLE not in indexed:
        return frozenset({SINGLE})
    if indexed:
        return indexed
    top = {name for name in names if "/" not in name and name.endswith(".safetensors")}
    return frozenset(name for name in top if not name.startswith((".", "adapter_")))


def companions(names: Collection[str]) -> frozenset[str]:
    """Of the files in the top folder those that are wanted beside the weights."""
    return frozenset(
        name
        for name in names
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in (*BESIDE_WEIGHTS, INDEX))
    )


def pickles(names: Collection[str]) -> list[str]:
    """Pickled weights in the top folder: never fetched, never read."""
    return sorted(n for n in names if "/" not in n and any(fnmatchcase(n, pattern) for pattern in PICKLES))


def missing_weights(folder: Path) -> list[str]:
    """Names of weight files that a folder should hold and does not; of any kind, when it holds none."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    index = read_index(folder / INDEX) if INDEX in names else None
    return sorted((weight_names(names, index) or {SINGLE}) - names)


def read_index(path: Path) -> dict[str, Any]:
    """The parsed index. ConfigError if it is no JSON object with a ``weight_map`` of plain names of files."""
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"model: {path}: is not valid JSON: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ConfigError(f"model: {path}: is not a JSON object with a weight_map of name to file")
    for file in index["weight_map"].values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise ConfigError(f"model: {path}: names the file {file!r}, expected a .safetensors beside it")
    return index
