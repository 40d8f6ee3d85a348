"""Which files of a folder hold a checkpoint's weights, and which tensor lies in which."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .safetensors_header import TensorEntry, read_header, unique_keys

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "pytorch_model.bin.index.json")
OF_SEVERAL = re.compile(r"(.+)-(\d{5,6})-of-(\d{5,6})\.safetensors")

Files = dict[Path, dict[str, TensorEntry]]


def locate_weights(folder: Path) -> Files:
    """The tensors of each file of the checkpoint in ``folder``, every file's header checked; no name is there twice.

    These are the files that ``model.safetensors.index.json`` names; without one, or beside a ``model.safetensors``
    that it does not name, that one file (as transformers has it); with neither, every .safetensors file but adapters.
    CheckpointError names the file and what was expected.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    weight_map = _read_index(folder / INDEX) if (folder / INDEX).is_file() else None
    if (folder / SINGLE).is_file() and (weight_map is None or SINGLE not in weight_map.values()):
        return {folder / SINGLE: read_header(folder / SINGLE)}
    if weight_map is not None:
        return _indexed(folder, weight_map)
    return _unindexed(folder)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        weight_map: dict[Any, Any] = json.loads(index.read_bytes(), object_pairs_hook=unique_keys)["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: is not a JSON object with a weight_map of name to file: {error!r}") from error
    for file in sorted(set(files.values())):
        if not file or Path(file).name != file:
            raise CheckpointError(f"{index}: names the file {file!r}, expected a plain file name in the same folder")
    return files


def _indexed(folder: Path, weight_map: dict[str, str]) -> Files:
    held = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    wanted: Files = {folder / file: {} for file in held}
    for name, file in weight_map.items():
        if name not in held[file]:
            raise CheckpointError(f"{folder / file}: has no tensor {name!r}, though {INDEX} says so")
        wanted[folder / file][name] = held[file][name]
    return wanted


def _unindexed(folder: Path) -> Files:
    found = sorted(folder.glob("*.safetensors"))
    paths = [path for path in found if not path.name.startswith((".", "adapter_"))]
    if not paths:
        raise CheckpointError(_nothing(folder, adapters=bool(found)))
    for path in paths:
        _check_siblings(path)
    held: Files = {}
    owner: dict[str, Path] = {}
    for path in paths:
        held[path] = read_header(path)
        for name in held[path]:
            if name in owner:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in {owner[name].name} as well, expected it once: there is no {INDEX} "
                    "that says which file is meant"
                )
            owner[name] = path
    return held


def _check_siblings(path: Path) -> None:
    """That the others of ``x-00001-of-00003.safetensors`` are there: without an index nothing else would tell."""
    if match := OF_SEVERAL.fullmatch(path.name):
        stem, number, count = match.groups()
        for other in range(1, int(count) + 1):
            sibling = path.with_name(f"{stem}-{other:0{len(number)}}-of-{count}.safetensors")
            if not sibling.is_file():
                raise CheckpointError(f"{sibling}: no such file, though {path.name} is there")


def _nothing(folder: Path, adapters: bool) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return f"{folder}: has only pickled weights ({pickles[0]}), expected safetensors: convert them"
    nothing = f"{folder}: has neither {SINGLE} nor {INDEX} nor any other .safetensors file"
    return f"{nothing} but an adapter's" if adapters else nothing
