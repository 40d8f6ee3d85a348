"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: ``$EXPERTMESH_CACHE``, else ``$XDG_CACHE_HOME/expertmesh``, else
    ``~/.cache/expertmesh``.

    It is absolute and need not exist yet. Empty variables count as unset, relative ones are taken from the
    working directory.
    """
    if chosen := os.environ.get("EXPERTMESH_CACHE"):
        return Path(chosen).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "expertmesh"
    return Path.home() / ".cache" / "expertmesh"
