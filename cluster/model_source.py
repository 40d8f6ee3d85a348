"""From the configuration's ``model`` to a checkpoint folder on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.config import ConfigError
from cluster.hub import Hub
from cluster.hub_id import HubId

DEFAULT_MODEL = "default"
DEFAULT_MODEL_NAME = "smollm2-135m-moe"
_PATH_STARTS = ("/", "./", "../", "~")
_FILE_ENDS = (".json", ".safetensors")


def pinned_model(model: str) -> str:
    """What all nodes are told, so that each gets the same: a repository at a commit, or a folder's absolute path.

    Asks the hub, once, what a branch or tag means now; says on stderr when only the cache knows. Raises ConfigError.
    """
    if model == DEFAULT_MODEL:
        return model
    source = model_source(model)
    return str(source) if isinstance(source, Path) else str(Hub().pin(source, progress=True))


def resolve_model(model: str, progress: bool = False, check: Callable[[Path], None] | None = None) -> Path:
    """The folder of ``model`` on this machine; "default" is made, and a repository fetched, if it is not there yet.

    ``check``: called before weights are fetched, if they are, with the folder that has the rest. What it raises is
    passed on.
    Raises ConfigError; of the hub's errors, HubError.
    """
    if model == DEFAULT_MODEL:
        from cluster.default_model import cache_dir, ensure_default_model

        try:
            return ensure_default_model(progress=progress)
        except OSError as error:
            raise ConfigError(f"model: the default model cannot be made in {cache_dir()}: {error}") from error
    source = model_source(model)
    return source if isinstance(source, Path) else Hub().fetch(source, progress, check)


def model_source(model: str) -> Path | HubId:
    """An existing folder's absolute path, or a repository: a folder wins over a repository of the same name.

    A link stays one: each node follows its own, and clients call the model by the link's name.

    Raises ConfigError for what is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _absolute(path)
    if model.startswith(_PATH_STARTS) or model in (".", ".."):
        raise ConfigError(f"model: {model!r} is not a folder; give the folder of a checkpoint, or {DEFAULT_MODEL!r}")
    if model.endswith(_FILE_ENDS):
        what = "a file" if path.is_file() else "neither a folder nor a file here"
        raise ConfigError(f"model: {model!r} is {what}; give the folder of a checkpoint, or {DEFAULT_MODEL!r}")
    wanted = HubId.parse(model)
    if wanted is None:
        raise ConfigError(
            f"model: {model!r} is not a folder, and no repository is called so; give the folder of a checkpoint, "
            f"ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub, or {DEFAULT_MODEL!r}"
        )
    return wanted


def model_name(model: str) -> str:
    """What clients call it: a folder's name; a repository's, without the revision. Asks nobody: no node but that of
    ``serve`` needs to have the folder."""
    if model == DEFAULT_MODEL:
        return DEFAULT_MODEL_NAME
    path = Path(model).expanduser()
    wanted = None if path.is_dir() or model.startswith(_PATH_STARTS) else HubId.parse(model)
    return _absolute(path).name if wanted is None else wanted.repo


def _absolute(path: Path) -> Path:
    """Without following links, but where ".." comes after one: what that means depends on where the link leads."""
    return path.resolve() if ".." in path.parts else path.absolute()
