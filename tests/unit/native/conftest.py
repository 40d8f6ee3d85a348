"""The kernels of every instruction set that this machine has, with two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels import INSTRUCTION_SETS, use


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(request.param, monkeypatch).isa


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
