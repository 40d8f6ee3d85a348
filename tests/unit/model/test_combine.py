from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.messages import tensor_bytes
from actors.model.combine import Piece, combine_rows, gathered
from actors.model.local_moe import LocalMoE
from tests.checkpoints import WRITERS
from tests.paged_runner import PagedRunner

WIDE = {"hidden_size": 128}  # grouped_mm wants rows of whole 16 bytes


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_routed_sum_is_bit_equal_to_grouped_mm(
    checkpoint_of: Callable[..., tuple[Path, Any]], family: str, dtype: torch.dtype, top_k: int
) -> None:
    """Gate, experts and sum; without the shared expert."""
    count = {"n_routed_experts": 16} if family.startswith(("deepseek", "glm")) else {"num_experts": 8}
    count = {"num_local_experts": 8} if family == "mixtral" else count
    path, model = checkpoint_of(family, 2, dtype=dtype, num_experts_per_tok=top_k, **WIDE, **count)
    runner = PagedRunner(path, dtype)
    layer = runner.spec.moe_layers[-1]
    block = model.model.layers[layer].mlp
    x = torch.randn(57, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        _, weights, experts = block.gate(x)
        want = block.experts(x, experts, weights)
    moe = LocalMoE(runner.gate, runner.bank)
    assert torch.equal(moe.finish(moe.start(layer, x)), want)


def test_weights_in_the_models_dtype_round_each_row() -> None:
    out = torch.tensor([[[1.0], [2**-8]]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 1 + 2**-7]])
    fine = combine_rows(out, weight, torch.float32)
    coarse = combine_rows(out, weight.to(torch.bfloat16), torch.float32)
    assert fine.item() == 1 + 2**-8 + 2**-15
    assert coarse.item() == 1 + 2**-8 + 2**-15, "1 + 2**-7 is a bf16, and so is its product with a power of two"
    third = torch.full((1, 2), 1 / 3)
    products = combine_rows(out, third.to(torch.bfloat16), torch.float32)
    assert products.item() == 0.333984375 + 0.333984375 * 2**-8
    rounded = torch.tensor([[[1.0078125], [0.0]]], dtype=torch.bfloat16)
    assert combine_rows(rounded, third.to(torch.bfloat16), torch.float32).item() == 0.3359375
    assert combine_rows(rounded, third, torch.float32).item() == pytest.approx(1.0078125 / 3, rel=1e-6)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_bytes", [True, False])
def test_pieces_are_gathered_where_they_belong(dtype: torch.dtype, of_bytes: bool) -> None:
    rows = torch.randn(5, 3).to(dtype)
    slots = np.array([4, 0, 2]), np.array([1, 3])
    lie = [rows[:3], rows[3:]]
    pieces = [Piece(at, tensor_bytes(one) if of_bytes else one) for at, one in zip(slots, lie, strict=True)]
    out = gathered(pieces, 5, 3, dtype, torch.device("cpu"))
    assert torch.equal(out, rows[[1, 3, 2, 4, 0]])


def test_pieces_are_gathered_on_a_device_too() -> None:
    pieces = [Piece(np.array([slot]), torch.ones(1, 3, device="meta")) for slot in (1, 0)]
    assert gathered(pieces, 2, 3, torch.float32, torch.device("meta")).shape == (2, 3)
