from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import WRITERS, write_deepseek_v3, write_glm4_moe


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=["deepseek_v3", "glm4_moe"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, Hugging Face model) of one family's default tiny checkpoint."""
    path = tmp_path_factory.mktemp(request.param)
    return path, WRITERS[request.param](path)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("deepseek")
    return path, write_deepseek_v3(path)


@pytest.fixture(scope="session")
def glm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("glm")
    return path, write_glm4_moe(path)
