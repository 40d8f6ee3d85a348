"""Which files of a folder hold a checkpoint's weights, and which tensor lies in which."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .safetensors_header import Header, Stamp, TensorEntry, read_header
from .weight_names import INDEX, SINGLE, parse_index, pickles, siblings, weight_names

Files = dict[Path, Header]


def locate_weights(folder: Path) -> dict[Path, dict[str, TensorEntry]]:
    """The tensors of each file of the checkpoint in ``folder``; see :func:`read_headers`."""
    return {path: header.entries for path, header in read_headers(folder).items()}


def listing_stamps(folder: Path) -> dict[Path, Stamp | None]:
    """Of what says which files of ``folder`` are read, beside those files themselves."""
    return {path: Stamp.of(path) for path in (folder, folder / INDEX)}


def read_headers(folder: Path) -> Files:
    """The header of each file of the checkpoint in ``folder``, checked; no tensor's name is there twice.

    Which files these are: see :func:`weight_names`. CheckpointError names the file and what was expected.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    index = _read_index(folder / INDEX) if INDEX in names else None
    files = weight_names(names, index)
    if not files:
        raise CheckpointError(_nothing(folder, names))
    if index is not None and files == set(index["weight_map"].values()):
        return _indexed(folder, index["weight_map"])
    return _unindexed(folder, files, names)


def _read_index(index: Path) -> dict[str, Any]:
    try:
        return parse_index(index.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: {error}") from error


def _indexed(folder: Path, weight_map: dict[str, str]) -> Files:
    held = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    wanted: Files = {folder / file: Header({}, header.stamp) for file, header in held.items()}
    for name, file in weight_map.items():
        if name not in held[file].entries:
            raise CheckpointError(f"{folder / file}: has no tensor {name!r}, though {INDEX} says so")
        wanted[folder / file].entries[name] = held[file].entries[name]
    return wanted


def _unindexed(folder: Path, files: Collection[str], names: Collection[str]) -> Files:
    for file in sorted(set(files).difference(names)):
        known = min(siblings(file).intersection(names))
        raise CheckpointError(f"{folder / file}: no such file, though {known} is there")
    held: Files = {}
    owner: dict[str, Path] = {}
    for path in (folder / file for file in sorted(files)):
        held[path] = read_header(path)
        for name in held[path].entries:
            if name in owner:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in {owner[name].name} as well, expected it once: there is no {INDEX} "
                    "that says which file is meant"
                )
            owner[name] = path
    return held


def _nothing(folder: Path, names: Collection[str]) -> str:
    if found := pickles(names):
        return f"{folder}: has only pickled weights ({found[0]}), expected safetensors: convert them"
    nothing = f"{folder}: has neither {SINGLE} nor {INDEX} nor any other .safetensors file"
    return f"{nothing} but an adapter's" if any(name.endswith(".safetensors") for name in names) else nothing
