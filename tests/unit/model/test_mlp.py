from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from actors.model.experts import ExpertBank
from actors.model.mlp import SwiGLU
from actors.model.norm import rms_norm
from actors.model.quant.qtensor import stack
from actors.model.quant.quantize import quantize
from actors.quant_kind import QuantKind


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("row_block", [0, 8])
def test_swiglu(row_block: int) -> None:
    gate, up, down = draw(27, 16, seed=1), draw(27, 16, seed=2), draw(16, 27, seed=3)
    x = draw(11, 16)
    want = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    got = SwiGLU(torch.cat((gate, up)), down)(x, row_block)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row_block", [0, 8])
def test_swiglu_of_quantised_matrices(row_block: int) -> None:
    """Also where gate and up cannot lie under one another."""
    gate, up, down = (
        quantize(draw(27, 16, seed=1), "int4"),
        quantize(draw(27, 16, seed=2), "int4"),
        draw(16, 27, seed=3),
    )
    x = draw(11, 16)
    dense = (gate.dequantize(torch.float32), up.dequantize(torch.float32))
    want = (F.silu(x @ dense[0].T) * (x @ dense[1].T)) @ down.T
    together, apart, mixed = SwiGLU(stack([gate, up]), down), SwiGLU((gate, up), down), SwiGLU((gate, dense[1]), down)
    for mlp in (together, apart, mixed):
        torch.testing.assert_close(mlp(x, row_block), want, rtol=1e-5, atol=1e-5)
    assert together.nbytes == apart.nbytes == gate.nbytes + up.nbytes + down.nbytes
    assert mixed.nbytes == gate.nbytes + dense[1].nbytes + down.nbytes


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic_swiglu_does_not_look_at_mates(threads: int) -> None:
    """Rows enough that several threads share the work, and a width that ends in the middle of a vector."""
    mlp = SwiGLU(draw(54, 16, seed=1), draw(16, 27, seed=2))
    x = draw(4001, 16, seed=3)
    torch.set_num_threads(threads)
    try:
        whole = mlp(x, row_block=8)
        for row in [*range(0, 4001, 59), 1999, 2000, 2001]:
            assert torch.equal(mlp(x[row : row + 1], row_block=8)[0], whole[row])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_bit_equal_to_the_reference(dtype: torch.dtype) -> None:
    theirs = DeepseekV3RMSNorm(48, eps=1e-3).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(1 + draw(48, seed=4))
        x = draw(9, 48, seed=5).to(dtype) * 0.1
        assert torch.equal(rms_norm(x, theirs.weight, 1e-3), theirs(x))


def test_norm_does_not_look_at_mates() -> None:
    x, weight = draw(700, 75, seed=6), draw(75, seed=7)
    whole = rms_norm(x, weight, 1e-6)
    for row in range(0, 700, 9):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], whole[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_a_shared_expert_has_the_bits_of_a_routed_one(dtype: torch.dtype, kind: QuantKind | None) -> None:
    """Whatever the number of rows, in the deterministic mode."""
    parts = draw(96, 64, seed=1), draw(64, 48, seed=2)
    if kind == "int4":
        parts = draw(128, 64, seed=1), draw(64, 64, seed=2)
    gate_up, down = (part.to(dtype) if kind is None else quantize(part, kind) for part in parts)
    expert = SwiGLU(gate_up, down)
    bank = ExpertBank({(0, 3): expert}, 64, dtype, row_block=8)
    x = draw(40, 64).to(dtype)
    routed = bank.forward(0, x, torch.arange(40), torch.full((40,), 3))
    for count in (1, 2, 9, 40):
        assert torch.equal(expert(x[:count], row_block=8), routed[:count])
