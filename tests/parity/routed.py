"""Whether gate, experts and combine of one layer give transformers' bits in bf16."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints import WRITERS
from tests.paged_runner import PagedRunner
from tests.parity.fleet import ExpertFleet

ROWS = 256

LEAST_EQUAL = 0.999
"""The CPU kernels add in an order of their own: so many of the numbers must have transformers' bits nevertheless, and
the others are off by a rounding. With torch's products all have them (tests/unit/model/test_combine.py)."""


def equal_share(ours: Tensor, theirs: Tensor) -> float:
    """The part of the numbers that are equal bit by bit; 0 where one is off by two roundings of the largest."""
    if (ours.double() - theirs.double()).abs().max() > 2**-7 * theirs.double().abs().max():
        return 0.0
    return float((ours == theirs).double().mean())


@torch.inference_mode()
def routed_outputs(family: str, fleet: ExpertFleet, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """transformers', ours in one process, and ours over a router and three shards: each [ROWS, D] in bf16, for the same
    random rows in the last MoE layer of a random checkpoint of ``family``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = WRITERS[family](path, seed=seed, dtype=torch.bfloat16)
        runner = PagedRunner(path, torch.bfloat16)
        layer = runner.spec.moe_layers[-1]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(ROWS, runner.spec.d_model, generator=generator).to(torch.bfloat16)
        here = runner.moe.finish(runner.moe.start(layer, rows))
        with fleet.serving(path, torch.bfloat16) as client:
            client.begin_step()
            there = client.finish(client.start(layer, rows)).clone()
            fleet.check_all_were_asked()
    return _theirs(model.model.layers[layer].mlp, rows), here, there


def _theirs(block: Any, rows: Tensor) -> Tensor:
    """The block without its shared expert."""
    _, weights, experts = block.gate(rows)
    result: Tensor = block.experts(rows, experts, weights)
    return result
