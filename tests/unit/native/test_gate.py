"""The kernels' choice of experts against the operations of torch, on every instruction set of this machine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from actors.model.gate import Gate, GateWeights
from actors.model.spec import GateSpec, MoESpec
from tests.kernels import INSTRUCTION_SETS, use

RULES = {
    "softmax": GateSpec("softmax", scale=16.0),
    "softmax of groups": GateSpec("softmax", n_group=4, topk_group=2),
    "sigmoid of groups": GateSpec(
        "sigmoid", bias=True, n_group=8, topk_group=3, group_rank="top2_sum", masked=-math.inf, normalise=True,
        epsilon=1e-20, scale=2.5,
    ),
    "logits and weights in the model's dtype": GateSpec("softmax", logits="model", weights="model", ranked=True),
    "bias in the model's dtype": GateSpec("sigmoid", logits="model", bias=True, normalise=True),
}  # fmt: skip


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(request.param, monkeypatch).isa


def gate_of(rule: GateSpec, dtype: torch.dtype, experts: int = 72, top_k: int = 6) -> Gate:
    numbers = torch.Generator().manual_seed(5)
    logits = torch.float32 if rule.logits == "float32" else dtype
    weight = (torch.randn(experts, 96, generator=numbers) * 0.2).to(logits)
    bias = torch.randn(experts, generator=numbers).to(logits) if rule.bias else None
    return Gate(MoESpec(experts, top_k, 8, rule), {3: GateWeights(weight, bias)}, row_block=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_that_of_torch(rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of(RULES[rule], dtype)
    x = torch.randn(37, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    experts, weights = gate.route(3, x)
    with monkeypatch.context() as torch_alone:
        torch_alone.setattr("actors.native.products.library", lambda: None)
        want_experts, want_weights = gate_of(replace(RULES[rule], ranked=True), dtype).route(3, x)
    assert weights.dtype == want_weights.dtype
    bf16_ties = rule != "softmax" and dtype == torch.bfloat16 and RULES[rule].logits == "model"
    same = (experts == want_experts).all(1)
    assert same.float().mean() > (0.6 if bf16_ties else 0.99), "of ties the one takes the first, the other any"
    loose = 2**-7 if weights.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(weights[same], want_weights[same], rtol=loose, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_look_at_its_mates(rule: str, dtype: torch.dtype) -> None:
    gate = gate_of(RULES[rule], dtype)
    x = torch.randn(37, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    experts, weights = gate.route(3, x)
    for row in (0, 17, 36):
        alone = gate.route(3, x[row : row + 1])
        assert torch.equal(alone[0][0], experts[row])
        assert torch.equal(alone[1][0], weights[row])


def test_the_first_of_equals_is_chosen_and_nan_before_all() -> None:
    rule = GateSpec("softmax", n_group=2, topk_group=1)
    gate = Gate(MoESpec(8, 3, 8, rule), {0: GateWeights(torch.eye(8), None)})
    equal = torch.zeros(1, 8)
    equal[0, 6:] = -0.0
    assert gate.route(0, equal)[0].tolist() == [[0, 1, 2]]
    high = torch.zeros(1, 8)
    high[0, 5] = 1.0
    assert gate.route(0, high)[0].tolist() == [[5, 4, 6]], "its group alone"
    experts, weights = gate.route(0, torch.full((1, 8), math.nan))
    assert sorted(experts[0].tolist()) == [0, 1, 2]
    assert weights.isnan().all()


def test_rows_of_another_width_or_dtype_are_refused() -> None:
    gate = gate_of(RULES["softmax"], torch.float32)
    with pytest.raises(ValueError, match="x has 95 columns, the gate takes 96"):
        gate.route(3, torch.zeros(2, 95))
    narrow = gate_of(RULES["logits and weights in the model's dtype"], torch.bfloat16)
    with pytest.raises(RuntimeError):
        narrow.route(3, torch.zeros(2, 96))
