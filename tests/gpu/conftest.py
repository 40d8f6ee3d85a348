"""Tests on real devices. Where something is missing they are skipped, and the reason names all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.transport.cupy_nccl import CupyBackend, cuda_missing, requirements_missing
from tests.multiprocess.transport.nccl_members import Fleet
from tests.serving import tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what lies in this folder unless NCCL, or for files without it in their names a GPU, can be used here."""
    no_nccl, no_gpu = requirements_missing(), cuda_missing()
    for item in items:
        if "gpu" in item.path.parts and "nccl" in item.path.name and no_nccl:
            item.add_marker(pytest.mark.skip(reason="no NCCL on this machine: " + "; ".join(no_nccl)))
        elif "gpu" in item.path.parts and no_gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine: " + "; ".join(no_gpu)))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a random deepseek_v3 checkpoint, and the Hugging Face model that wrote it (on the CPU)."""
    path = tmp_path_factory.mktemp("v3")
    return path, tiny_model(path)


@pytest.fixture
def backend() -> CupyBackend:
    """NCCL on the first device."""
    return CupyBackend(torch.device("cuda", 0))


@pytest.fixture
def devices() -> Iterator[Callable[[int], Fleet]]:
    """``devices(n)``: a fleet for n members on a GPU each; skips where there are fewer."""
    fleets: list[Fleet] = []

    def need(count: int) -> Fleet:
        if torch.cuda.device_count() < count:
            pytest.skip(f"{count} CUDA devices are needed, one a member; torch sees {torch.cuda.device_count()}")
        fleets.append(Fleet(on_devices=True))
        return fleets[-1]

    yield need
    for fleet in fleets:
        fleet.close()
