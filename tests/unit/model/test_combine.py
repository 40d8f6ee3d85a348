from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.model.combine import combine_rows
from actors.model.local_moe import LocalMoE
from tests.checkpoints import write_deepseek_v3, write_glm4_moe
from tests.paged_runner import PagedRunner


@pytest.mark.parametrize("write", [write_deepseek_v3, write_glm4_moe])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [1, 4, 8])
def test_routed_sum_is_bit_equal_to_grouped_mm(tmp_path: Path, write: Any, dtype: torch.dtype, top_k: int) -> None:
    hidden = 128  # grouped_mm wants rows of whole 16 bytes
    model = write(tmp_path, seed=2, dtype=dtype, hidden_size=hidden, num_experts_per_tok=top_k)
    runner = PagedRunner(tmp_path, dtype)
    layer = runner.spec.moe_layers[0]
    block = model.model.layers[layer].mlp
    x = torch.randn(57, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        _, weights, experts = block.gate(x)
        want = block.experts(x, experts, weights)
    moe = LocalMoE(runner.gate, runner.bank)
    assert torch.equal(moe.finish(moe.start(layer, x)), want)


def reference(out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (out.double() * weight.double().unsqueeze(-1)).sum(1)


def test_sum_is_fp32_with_one_cast() -> None:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(200, 8, 64, generator=generator).to(torch.bfloat16)
    weight = torch.rand(200, 8, generator=generator)
    got = combine_rows(out, weight, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    rounded = reference(out, weight).to(torch.bfloat16)
    assert (got != rounded).float().mean() < 1e-3


def test_order_is_that_of_k() -> None:
    out = torch.tensor([[[1e8], [1.0], [-1e8]]])
    weight = torch.ones(1, 3)
    assert combine_rows(out, weight, torch.float32).item() == 0.0
    assert combine_rows(out[:, [0, 2, 1]], weight, torch.float32).item() == 1.0


def test_one_expert_and_no_tokens() -> None:
    out, weight = torch.randn(3, 1, 4), torch.rand(3, 1)
    assert torch.equal(combine_rows(out, weight, torch.float32), out[:, 0] * weight)
    assert combine_rows(out[:0], weight[:0], torch.float32).shape == (0, 4)


def test_handle_of_someone_else_is_refused(glm: tuple[Path, Any]) -> None:
    with pytest.raises(TypeError, match="handle is str"):
        PagedRunner(glm[0]).moe.finish("no handle")
