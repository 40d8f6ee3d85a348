from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from actors.model.weights import Checkpoint

Store = Callable[[Mapping[str, Tensor]], Checkpoint]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Writes tensors to a checkpoint and opens it."""

    def write(tensors: Mapping[str, Tensor]) -> Checkpoint:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path)

    return write
