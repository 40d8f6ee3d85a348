"""From the configuration's ``model`` to a checkpoint folder on this machine."""

from __future__ import annotations

from pathlib import Path

from cluster.config import ConfigError

DEFAULT_MODEL = "default"
DEFAULT_MODEL_NAME = "smollm2-135m-moe"


def resolve_model(model: str, progress: bool = False) -> Path:
    """The folder of ``model``; "default" is made in the user's cache first if it is not there yet.

    Raises ConfigError when there is no such folder.
    """
    if model == DEFAULT_MODEL:
        from cluster.default_model import cache_dir, ensure_default_model

        try:
            return ensure_default_model(progress=progress)
        except OSError as error:
            raise ConfigError(f"model: the default model cannot be made in {cache_dir()}: {error}") from error
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model: {model!r} is not a folder; give the folder of a checkpoint, or {DEFAULT_MODEL!r}")
    return path.resolve()


def model_name(model: str) -> str:
    """What clients call it."""
    return DEFAULT_MODEL_NAME if model == DEFAULT_MODEL else Path(model).expanduser().resolve().name
