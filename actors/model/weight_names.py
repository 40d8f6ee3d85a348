"""Which files make a checkpoint's weights: one rule over names, for folders as for repositories."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from .safetensors_header import unique_keys

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "pytorch_model.bin.index.json")
_OF_SEVERAL = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<count>\d{5,6})\.safetensors")


def weight_names(names: Collection[str], index: Mapping[str, Any] | None) -> frozenset[str]:
    """The files that hold weights, of a place with the files ``names``; ``index``: see parse_index, if there is one.

    Those that the index names; without one, or beside a model.safetensors that it does not name, that one file (as
    transformers has it); with neither, every .safetensors file in the top folder but adapters, and of files numbered
    ``x-00001-of-00003.safetensors`` all. What an index or a number promises need not be in ``names``.
    """
    indexed = frozenset((index or {}).get("weight_map", {}).values())
    if SINGLE in names and SINGLE not in indexed:
        return frozenset({SINGLE})
    if indexed:
        return indexed
    top = {name for name in names if "/" not in name and name.endswith(".safetensors")}
    plain = {name for name in top if not name.startswith((".", "adapter_"))}
    promised: set[str] = set()
    for name in plain:
        if name not in promised:
            promised |= siblings(name)
    return frozenset(plain | promised)


def siblings(name: str) -> set[str]:
    """All files of the series to which a numbered one belongs: without an index nothing else would tell of them."""
    match = _OF_SEVERAL.fullmatch(name)
    if match is None:
        return set()
    stem, width, count = match["stem"], len(match["number"]), match["count"]
    return {f"{stem}-{number:0{width}}-of-{count}.safetensors" for number in range(1, int(count) + 1)}


def parse_index(text: bytes) -> dict[str, Any]:
    """The index: its ``weight_map`` leads from a tensor's name to a file beside it. ValueError: what is wrong."""
    no_index = "is not a JSON object with a weight_map of name to file"
    try:
        index = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{no_index}: {error!r}") from error
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ValueError(no_index)
    for file in index["weight_map"].values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or PurePath(file).name != file:
            raise ValueError(f"names the file {file!r}, expected a plain file name that ends in .safetensors")
    return index


def pickles(names: Collection[str]) -> list[str]:
    """Pickled weights in the top folder: never fetched, never read."""
    return sorted(n for n in names if "/" not in n and any(fnmatchcase(n, pattern) for pattern in PICKLES))
