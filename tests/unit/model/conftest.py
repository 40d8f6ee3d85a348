from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import WRITERS


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def torch_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernels are not built: what is compared bit for bit with torch must be computed by torch."""
    monkeypatch.setattr("actors.native.products.library", lambda: None)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """(family, seed, **overrides) -> (folder, Hugging Face model); what is asked for twice is written once."""
    written: dict[str, tuple[Path, Any]] = {}

    def get(family: str, seed: int = 0, **overrides: Any) -> tuple[Path, Any]:
        key = repr((family, seed, overrides))
        if key not in written:
            path = tmp_path_factory.mktemp(family)
            written[key] = path, WRITERS[family](path, seed=seed, **overrides)
        return written[key]

    return get


@pytest.fixture(scope="session", params=["deepseek_v3", "glm4_moe"])
def written(request: pytest.FixtureRequest, checkpoint_of: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    """(folder, Hugging Face model) of one family's default tiny checkpoint."""
    return checkpoint_of(request.param)


@pytest.fixture(scope="session")
def deepseek(checkpoint_of: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    return checkpoint_of("deepseek_v3")


@pytest.fixture(scope="session")
def glm(checkpoint_of: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    return checkpoint_of("glm4_moe")
