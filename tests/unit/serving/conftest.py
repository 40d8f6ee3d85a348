"""Clusters in this process, over a random deepseek_v3 checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import ServerConfig, load_config
from tests.serving import tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Its folder, and the Hugging Face model that wrote it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("v3")
    return path, tiny_model(path)


@pytest.fixture(scope="session")
def local() -> Callable[..., ServerConfig]:
    """``local(path, **dotted_keys)``: a configuration without Ray, on a free port."""

    def config(path: Path, **overrides: Any) -> ServerConfig:
        keys = {"transport": "local", "gateway.port": 0, "attention.threads": 1, "experts.threads": 1}
        return load_config(None, {"model": str(path), **keys, "attention.kv_memory": "4MiB", **overrides})

    return config
