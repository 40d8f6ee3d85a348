"""What an output belongs to: written beside it before the first row is sent, compared when the batch goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertmesh.v1 import inference_pb2 as pb
from google.protobuf.json_format import MessageToDict

from cluster.batch.errors import BatchError
from cluster.batch.rows import InputIdentity

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """``input`` and ``model`` (what the gateway tells of it) say where the answers come from; ``seed`` keys the draws
    of rows that have none of their own. ``batch`` is the id of the whole; ``created`` is UTC, ISO 8601."""

    batch: str
    created: str
    expertmesh: str
    seed: int
    input: InputIdentity
    model: dict[str, Any]


def manifest_path(output: Path) -> Path:
    """Beside the output."""
    return output.with_name(output.name + ".manifest.json")


def describe_model(info: pb.GetModelInfoResponse) -> dict[str, Any]:
    """Everything the gateway tells of its model: any of it may change answers."""
    described: dict[str, Any] = MessageToDict(
        info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return described


def differences(begun: Manifest, now: Manifest) -> list[str]:
    """What answers depend on and is not as it was, each as "key: was → is"."""
    changed = [
        f"input {key}: {was} → {getattr(now.input, key)}"
        for key, was in asdict(begun.input).items()
        if was != getattr(now.input, key)
    ]
    if begun.seed != now.seed:
        changed.append(f"seed: {begun.seed} → {now.seed}")
    return changed + model_differences(begun.model, now.model)


def model_differences(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The same for the model alone; what a newer gateway tells besides is no difference."""
    return [f"model {key}: {was} → {now.get(key)}" for key, was in begun.items() if was != now.get(key)]


def write_manifest(path: Path, manifest: Manifest) -> None:
    """All of it or nothing, and on disk when this returns. Raises OSError."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **asdict(manifest)}, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def read_manifest(path: Path) -> Manifest | None:
    """None if there is none. Raises BatchError for a file that is no manifest, and OSError."""
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_bytes())
        if fields.pop("format") != FORMAT:
            raise BatchError(f"{path}: its format is not {FORMAT}; it was written by another version of expertmesh")
        return Manifest(**{**fields, "input": InputIdentity(**fields["input"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BatchError(f"{path}: not a manifest of a batch ({error})") from None


def sync_folder(folder: Path) -> None:
    """A new name in a folder is on disk only when the folder is. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
