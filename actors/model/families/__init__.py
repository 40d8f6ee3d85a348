"""From a Hugging Face config.json to a :class:`MoEDecoderSpec`. A new family is a row in FAMILIES."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.model.config_fields import Fields
from actors.model.errors import CheckpointError, UnsupportedModelError
from actors.model.spec import MoEDecoderSpec

from .common import NEUTRAL, Family
from .deepseek import DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from .glm import GLM4_MOE
from .mistral import MIXTRAL
from .olmo import OLMOE
from .qwen import QWEN2_MOE, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "deepseek": DEEPSEEK,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V32,
    "glm4_moe": GLM4_MOE,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
}
"""By ``model_type``."""


def spec_from_config(config: dict[str, Any], where: str = "") -> MoEDecoderSpec:
    """The model that a parsed config.json describes; code that the repository names in ``auto_map`` is never run.

    Takes hub style (``rope_theta`` and ``rope_scaling``) and transformers 5 style (``rope_parameters``). The
    ``model_type`` chooses the family; keys that re-saved configurations lose have transformers' defaults.
    Raises UnsupportedModelError naming the key (after ``where``), its value, and what is allowed: for what is not
    built, and for keys that contradict the family or one another.
    """
    family = FAMILIES[Fields(config, where).one_of("model_type", tuple(FAMILIES))]
    fields = Fields(config, where, family.defaults)
    spec = family.build(fields)
    fields.refuse_unasked(NEUTRAL)
    return spec


def load_spec(path: str | Path) -> MoEDecoderSpec:
    """The model in the checkpoint folder ``path``; its stop ids include those of generation_config.json.

    Raises CheckpointError for a folder or file that cannot be read, UnsupportedModelError for what it says.
    """
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, expected a folder with config.json and *.safetensors")
    config = folder / "config.json"
    spec = spec_from_config(read_json(config), f"{config}: ")
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return spec
    more = Fields(read_json(generation), f"{generation}: ").token_ids("eos_token_id")
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + more)))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, such as a config.json. Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


__all__ = ["CheckpointError", "FAMILIES", "UnsupportedModelError", "load_spec", "read_json", "spec_from_config"]
