"""The kernels of every instruction set that this machine has, with two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actors.native.library import Library, functions, instruction_sets

BUILT = functions()


@pytest.fixture(params=instruction_sets(BUILT) if BUILT else [])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    assert BUILT is not None
    kernels = Library(BUILT, request.param)
    monkeypatch.setattr("actors.native.products.library", lambda: kernels)
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
