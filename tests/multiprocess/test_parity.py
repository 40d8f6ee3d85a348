"""Every model family is transformers, in each way to run it: the claims of docs/parity.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import WRITERS
from tests.parity.__main__ import HEADER, PAGE, introduction
from tests.parity.fleet import ExpertFleet, expert_fleet
from tests.parity.measure import BF16_LIMIT, FP32_LIMIT, MODES, agreement, reference
from tests.parity.routed import LEAST_EQUAL, equal_share, routed_outputs


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
    for mode in MODES:
        found = agreement(mode, tmp_path, torch.bfloat16, streams, fleet)
        assert found.low_is_as_good, (mode, found)
        assert found.error, "the reference in fp32 is missing"


@pytest.mark.parametrize("family", WRITERS)
def test_routed_experts_are_those_of_grouped_mm(family: str, fleet: ExpertFleet) -> None:
    theirs, here, there = routed_outputs(family, fleet)
    assert torch.equal(here, there)
    assert equal_share(here, theirs) >= LEAST_EQUAL


def test_the_page_is_the_one_that_is_generated() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert introduction() in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    table = [row for row in rows if len(row) == HEADER.splitlines()[0].count("|") - 1]
    assert [(row[0].strip("`"), row[1]) for row in table] == [(f, mode) for f in WRITERS for mode in MODES]
    assert all(float(row[2]) <= FP32_LIMIT and float(row[6]) <= BF16_LIMIT for row in table)
    assert "DIFFERENT" not in page
