"""Tests on real devices. Where something is missing they are skipped, and the reason names all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from actors.transport.cupy_nccl import CupyBackend, requirements_missing
from tests.multiprocess.transport.nccl_members import Fleet


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what lies in this folder unless NCCL can be used here."""
    missing = requirements_missing()
    if missing:
        skip = pytest.mark.skip(reason="no NCCL on this machine: " + "; ".join(missing))
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(skip)


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
