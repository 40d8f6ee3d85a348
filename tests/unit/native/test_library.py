"""Which kernels a process uses, and who says that a choice is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from actors.model.decoder import AttentionModel
from actors.model.experts import ExpertBank
from actors.model.gate import Gate
from actors.native.library import ISA_VARIABLE, functions, instruction_sets, library

LOADS: list[Callable[..., Any]] = [AttentionModel.load, Gate.load, ExpertBank.load]


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    library.cache_clear()
    yield
    library.cache_clear()


def test_the_best_one_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    built, chosen = functions(), library()
    assert built is not None
    assert chosen is not None
    assert chosen.isa == instruction_sets(built)[0]


@pytest.mark.parametrize("load", LOADS)
def test_a_wrong_choice_is_told_before_a_model_is_read(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "avx9")
    with pytest.raises(ValueError, match="EXPERTMESH_ISA: 'avx9'; here it may be "):
        load(None, None, [], torch.float32)
