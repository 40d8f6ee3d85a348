"""Which files of a repository make a checkpoint. Names and sizes only: no network, no reading of weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from actors.model.weight_names import INDEX, SINGLE, parse_index, weight_names
from cluster.config import ConfigError

CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
"""Without these no gateway can serve."""

BESIDE_WEIGHTS = (
    CONFIG,
    *TOKENIZER,
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
"""Patterns of what is wanted beside the weights. Code (*.py) is not among them, whatever ``auto_map`` says."""


@dataclass(frozen=True, slots=True)
class RepoFile:
    """``size`` in bytes, None if the hub does not tell; ``blob`` is what the cache calls its content."""

    size: int | None
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
        return sum(self.files[name].size or 0 for name in names)

    def lacking(self, folder: Path, names: Collection[str]) -> list[str]:
        """Those of ``names`` that ``folder`` has not, or not whole."""
        return [name for name in names if not (folder / name).is_file() or self.damaged(folder / name, name)]

    def damaged(self, path: Path, name: str) -> bool:
        """Whether ``path`` is a file, but has another size than the file ``name``."""
        size = self.files[name].size
        return size is not None and path.is_file() and path.stat().st_size != size


def companions(names: Collection[str]) -> frozenset[str]:
    """Of the files in the top folder those that are wanted beside the weights."""
    return frozenset(
        name
        for name in names
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in (*BESIDE_WEIGHTS, INDEX))
    )


def missing_weights(folder: Path) -> list[str]:
    """Names of weight files that a folder should hold and does not; of any kind, when it holds none."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    index = read_index(folder / INDEX) if INDEX in names else None
    return sorted((weight_names(names, index) or {SINGLE}) - names)


def read_index(path: Path) -> dict[str, Any]:
    """The parsed index. ConfigError if it is none."""
    try:
        return parse_index(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"model: {path}: {error}") from error
