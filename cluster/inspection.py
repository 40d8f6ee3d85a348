"""What can be said of a checkpoint without loading it: from its config.json, its index, and its files' headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.model.errors import CheckpointError, UnsupportedModelError
from actors.model.families import load_spec, read_json, spec_from_config
from actors.model.header_check import KnownHeaders, find_faults
from actors.model.inventory import Inventory, bytes_at_load, expert_shapes, held_bytes, resident_bytes
from actors.model.quant.layout import is_quantized, scale_bytes
from actors.model.safetensors_header import TensorEntry
from actors.model.spec import MoEDecoderSpec
from actors.model.surplus import skipped_tensors
from actors.model.tensor_list import expected_tensors, expert_tensors
from actors.model.weight_files import locate_weights
from actors.model.weight_names import INDEX, weight_names
from actors.quant_kind import NUMBER_KINDS
from cluster.hub import Hub
from cluster.hub_files import CONFIG, Listing, missing_weights, read_index
from cluster.hub_id import HubId
from cluster.model_source import DEFAULT_MODEL, model_source, resolve_model

_TOLD = 8
"""Of missing tensors so many are named, of other faults so many are told."""

Entries = Mapping[str, TensorEntry | None]
"""Tensors by name; None where only the index was seen."""


@dataclass(frozen=True)
class Sizes:
    """All in bytes, but the inventory. ``attention_shard``: its weights, by ``attention.quantization``; ``expert``: a
    routed expert in memory, by ``experts.quantization``; "none" alone if the checkpoint is quantised, and then for
    experts an estimate unless headers were seen. ``expert_on_disk`` and ``disk``, the
    latter of all files of weights: None if they were not seen."""

    inventory: Inventory
    attention_shard: dict[str, int]
    expert: dict[str, int]
    expert_on_disk: int | None
    kv_per_token: int
    disk: int | None


@dataclass(frozen=True)
class Inspection:
    """``model``: what was looked at, a repository at its commit. ``config``: config.json as it is. ``spec`` and
    ``sizes`` are None for a model that is not supported; then, and for weights that cannot be used, ``problems`` say
    why."""

    model: str
    config: dict[str, Any]
    spec: MoEDecoderSpec | None
    sizes: Sizes | None
    mtp_tensors: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """``weights``: the folder with all files, if they are there; else ``listing`` and the index may tell something."""

    model: str
    config: Path
    weights: Path | None = None
    listing: Listing | None = None


def inspect_model(model: str) -> Inspection:
    """Look at a folder, a config.json, or a repository of the hub (of which only config.json and index are fetched).

    Raises ConfigError and CheckpointError when there is nothing to look at.
    """
    source = _find(model)
    config = read_json(source.config)
    try:
        spec = spec_from_config(config, f"{source.config}: ") if source.weights is None else load_spec(source.weights)
    except UnsupportedModelError as error:
        return Inspection(source.model, config, None, None, 0, (str(error),))
    entries, disk, problems = _tensors(source)
    if entries is not None:
        problems += [f"{source.weights or source.model}: {problem}" for problem in tensor_problems(spec, entries)]
    mtp = skipped_tensors(spec, entries or ())
    return Inspection(source.model, config, spec, _sizes(spec, entries or {}, disk), mtp, tuple(problems))


def bytes_by_part(spec: MoEDecoderSpec, files: Iterable[Mapping[str, TensorEntry]]) -> Counter[str]:
    """Bytes on disk of the tensors that are read, scales and zero points too, by ``Part``. Those behind the last layer,
    and others that nobody reads, are not counted."""
    parts: dict[str, str] = {
        _stem(name): tensor.part for tensor in expected_tensors(spec) for name in (tensor.name, *tensor.aliases)
    }
    parts |= {name: "expert" for layer in spec.moe_layers for name in spec.names.fused_experts(layer)}
    sizes: Counter[str] = Counter()
    for name, entry in (item for held in files for item in held.items()):
        part = parts.get(name) or parts.get(_stem(name))
        if part is not None:
            sizes[part] += entry.end - entry.begin
    return sizes


def _find(model: str) -> _Source:
    path = Path(model).expanduser()
    if path.is_file():
        return _Source(str(path.resolve()), path)
    source = resolve_model(model) if model == DEFAULT_MODEL else model_source(model)
    if isinstance(source, Path):
        return _Source(str(source), source / CONFIG, source)
    return _find_on_hub(source)


def _find_on_hub(wanted: HubId) -> _Source:
    pinned, listing, folder = Hub().fetch_description(wanted)
    complete = listing is None and not missing_weights(folder)
    return _Source(str(pinned), folder / CONFIG, folder if complete else None, listing)


def _tensors(source: _Source) -> tuple[Entries | None, int | None, list[str]]:
    """What the weights' files hold (None: not to be known), their bytes, and what is wrong with them."""
    if source.listing is not None:
        return _indexed(source.config.parent / INDEX, source.listing)
    if source.weights is None:
        return None, None, []
    try:
        files = locate_weights(source.weights)
    except CheckpointError as error:
        return None, None, [str(error)]
    entries = {name: entry for held in files.values() for name, entry in held.items()}
    return entries, sum(file.stat().st_size for file in files), []


def _indexed(path: Path, listing: Listing) -> tuple[Entries | None, int | None, list[str]]:
    index = read_index(path) if INDEX in listing.names else None
    weights = weight_names(listing.names, index)
    why = f"{INDEX} names it" if index else "others of the same series are there"
    problems = [f"{name}: not in the repository, though {why}" for name in sorted(weights - listing.names)]
    entries = None if index is None else dict.fromkeys(index["weight_map"])
    return entries, listing.size(weights & listing.names), problems


def tensor_problems(spec: MoEDecoderSpec, entries: Entries) -> list[str]:
    """What loading would stumble over, as far as headers tell: tensors that are missing, what is wrong with others, and
    those that contradict config.json. At most so many lines as a terminal shows."""
    faults = list(find_faults(spec, KnownHeaders(entries)))
    missing = [fault.name for fault in faults if fault.text is None]
    told = [fault.text for fault in faults if fault.text is not None]
    problems = [f"{len(missing)} tensor(s) missing: {_some(missing)}"] if missing else []
    problems += told[:_TOLD]
    return problems if len(told) <= _TOLD else [*problems, f"{len(told) - _TOLD} more like these"]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return f"{', '.join(names[:_TOLD])}{more}"


def _stem(name: str) -> str:
    """Of a matrix and of its scales."""
    return name.rpartition(".")[0]


def _sizes(spec: MoEDecoderSpec, entries: Entries, disk: int | None) -> Sizes:
    shapes = expert_shapes(spec)
    expert = {"none": _expert_as_stored(spec, entries, shapes)}
    attention_shard = {"none": resident_bytes(spec)}
    if spec.quantization is None:
        expert |= {kind: bytes_at_load(shapes, kind) for kind in NUMBER_KINDS}
        attention_shard |= {kind: resident_bytes(spec, kind) for kind in NUMBER_KINDS}
    return Sizes(
        Inventory.of(spec),
        attention_shard,
        expert,
        _expert_on_disk(spec, entries),
        spec.kv_floats_per_token * spec.itemsize,
        disk,
    )


def _expert_as_stored(spec: MoEDecoderSpec, entries: Entries, shapes: list[tuple[int, int]]) -> int:
    """Bytes of an expert in memory, by the first one's headers if they were seen."""
    scheme, headers = spec.quantization, KnownHeaders(entries)
    names = [tensor.name for layer in spec.moe_layers[:1] for tensor in expert_tensors(spec, layer, 0)]
    if scheme is None or not any(entries.values()) or not names:
        return held_bytes(shapes, scheme, spec.itemsize)
    if not is_quantized(headers, scheme, names[0]):
        return held_bytes(shapes, None, spec.itemsize)
    return held_bytes(shapes, scheme, spec.itemsize, scale_bytes(headers, scheme, names[0]))


def _expert_on_disk(spec: MoEDecoderSpec, entries: Entries) -> int | None:
    """Bytes of the largest expert on disk, of those whose tensors' sizes are known."""
    by_stem: Counter[str] = Counter()
    for name, entry in entries.items():
        if entry is not None:
            by_stem[_stem(name)] += entry.end - entry.begin
    largest = 0
    for layer in spec.moe_layers:
        for expert in range(spec.moe.n_experts):
            tensors = expert_tensors(spec, layer, expert)
            largest = max(largest, sum(by_stem[_stem(tensor.name)] for tensor in tensors))
        fused = [entries.get(name) for name in spec.names.fused_experts(layer)]
        largest = max(largest, sum(entry.end - entry.begin for entry in fused if entry) // spec.moe.n_experts)
    return largest or None
