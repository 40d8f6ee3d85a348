"""Every model family is transformers, in each way to run it: the claims of docs/parity.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import WRITERS
from tests.parity.fleet import ExpertFleet, expert_fleet
from tests.parity.measure import BF16_LIMIT, FP32_LIMIT, MODES, agreement, reference
from tests.parity.routed import routed_outputs


@pytest.fixture(scope="module")
def fleet() -> Iterator[ExpertFleet]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with expert_fleet() as running:
        yield running
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", WRITERS)
def test_fp32_is_transformers(family: str, tmp_path: Path, fleet: ExpertFleet) -> None:
    streams = reference(WRITERS[family](tmp_path))
    for mode in MODES:
        found = agreement(mode, tmp_path, torch.float32, streams, fleet)
        assert found.delta <= FP32_LIMIT, (mode, found)
        assert found.tokens_agree, (mode, found)
        assert found.ties < found.steps // 4, "too many near-ties: this tests nothing"


@pytest.mark.parametrize("family", WRITERS)
def test_bf16_is_as_close_to_fp32_as_transformers(family: str, tmp_path: Path, fleet: ExpertFleet) -> None:
    streams = reference(WRITERS[family](tmp_path, dtype=torch.bfloat16))
    for mode in MODES[2:]:
        error = agreement(mode, tmp_path, torch.bfloat16, streams, fleet).error
        assert error is not None
        assert error <= BF16_LIMIT, mode


@pytest.mark.parametrize("family", WRITERS)
def test_routed_experts_have_the_bits_of_grouped_mm(family: str, fleet: ExpertFleet) -> None:
    theirs, here, there = routed_outputs(family, fleet)
    assert torch.equal(theirs, here)
    assert torch.equal(theirs, there)
