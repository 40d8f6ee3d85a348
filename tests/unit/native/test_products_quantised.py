"""Products with quantised weights against dense ones with the same numbers: the same bits, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.model.mlp import SwiGLU
from actors.model.quant.qtensor import QTensor
from actors.model.quant.quantize import quantize
from actors.native import products
from actors.native.expert_places import ExpertPlaces
from actors.native.matrix import weight_kind
from tests.experts_alone import assert_each_as_alone

pytestmark = pytest.mark.usefixtures("isa", "two_threads")

SCALES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [
    ("int8", 32, False, torch.bfloat16),
    ("int8", 128, False, torch.bfloat16),
    ("int8", 96, True, torch.float16),
    ("int8", 4096, False, torch.float32),
    ("int4", 32, True, torch.bfloat16),
    ("int4", 128, True, torch.float16),
    ("int4", 64, False, torch.float32),
    ("int4", 4096, False, torch.float16),
]
"""Kind, group, whether there are zero points, and what scales are kept in."""

SHAPES = [(1, 32, 1), (3, 160, 7), (8, 320, 100), (9, 320, 50), (40, 576, 131), (130, 800, 60)]
"""Rows, K and N: few rows and more, that fit in a cache and not, last groups that are shorter."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised(
    n: int, k: int, kind: str, group: int = 32, zeros: bool = True, scale: torch.dtype = torch.bfloat16, seed: int = 5
) -> QTensor:
    draw = torch.Generator().manual_seed(seed)
    groups = -(-k // group)
    signed = kind == "int8"
    data = torch.randint(0, 256, (n, k if signed else k // 2), generator=draw, dtype=torch.uint8)
    zero = torch.randint(-128 if signed else 0, 128 if signed else 121, (n, groups), generator=draw)
    scales = torch.rand(n, groups, generator=draw).add_(0.1) * (0.01 if signed else 0.1)
    scales[:1, :1] *= -1e-5  # fp16: below the normal numbers
    return QTensor(
        kind,  # type: ignore[arg-type]
        data.view(torch.int8) if signed else data,
        scales.to(scale),
        group,
        zero.to(torch.int8 if signed else torch.uint8) if zeros else None,
    )


def dense(x: Tensor, weight: QTensor, bias: Tensor | None = None) -> Tensor:
    """By the kernel for fp32, in the order in which the quantised kind adds up."""
    plain = weight.dequantize(torch.float32)
    if weight.kind == "int4":
        order = torch.arange(plain.shape[1]).view(-1, 16, 2).transpose(1, 2).flatten()
        plain, x = plain[:, order].contiguous(), x[:, order]
    wide = products.linear(x.float().contiguous(), plain, None if bias is None else bias.float())
    return wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_they_are_dense_products_with_the_dequantised_numbers(
    dtype: torch.dtype, form: tuple[str, int, bool, torch.dtype], rows: int, k: int, n: int
) -> None:
    x, weight = random(rows, k, dtype=dtype), quantised(n, k, *form)
    assert products.usable(x, weight)
    got = products.linear(x, weight)
    assert torch.equal(got, dense(x, weight))
    numbers = weight.dequantize(torch.float64)
    exact, magnitude = x.double() @ numbers.T, x.double().abs() @ numbers.abs().T
    rounding = 2**-8 * exact.abs() if dtype == torch.bfloat16 else 0
    assert ((got - exact).abs() <= 2**-22 * magnitude + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_row_does_not_know_its_mates(dtype: torch.dtype, kind: str) -> None:
    x, weight, bias = random(50, 416, dtype=dtype), quantised(77, 416, kind), random(77, dtype=dtype, seed=2)
    together = products.linear(x, weight, bias)
    assert torch.equal(together, dense(x, weight, bias))
    for count in (*range(1, 12), 49):
        assert torch.equal(products.linear(x[:count], weight, bias), together[:count])
    torch.set_num_threads(1)
    assert torch.equal(products.linear(x[7:19], weight, bias), together[7:19])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [4, 20])
def test_what_is_not_finite_stays_in_its_row(kind: str, rows: int) -> None:
    x, weight = random(rows, 96), quantised(30, 96, kind)
    want = products.linear(x, weight)
    x[2, 95], x[3, 0] = float("nan"), float("inf")
    got = products.linear(x, weight)
    assert got[2].isnan().all()
    assert not got[3].isfinite().any()
    kept = [i for i in range(rows) if i not in (2, 3)]
    assert torch.equal(got[kept], want[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_tiles_are_as_torch_makes_them(dtype: torch.dtype, form: tuple[str, int, bool, torch.dtype]) -> None:
    weight = quantised(300, 416, *form)
    for start, stop in ((0, 300), (7, 8), (299, 300), (64, 200)):
        out = torch.empty(stop - start, 416, dtype=dtype)
        products.dequantize(weight, start, out)
        assert torch.equal(out, weight.dequantize(dtype)[start:stop])


def forms_of_experts(d: int, inter: int, dtype: torch.dtype) -> dict[str, tuple[SwiGLU, SwiGLU]]:
    """Each with the fp64 one of the same numbers."""
    gate, up = (random(inter, d, seed=seed) / d**0.5 for seed in (1, 2))
    down, both = random(d, inter, seed=3), torch.cat([gate, up])
    plain = both.to(dtype), down.to(dtype)
    made = {
        "int8": SwiGLU(quantize(both, "int8"), quantize(down, "int8")),
        "int4": SwiGLU(quantize(both, "int4"), quantize(down, "int4")),
        "mixed": SwiGLU(quantize(both, "int4"), quantize(down, "int8")),
        "dense below": SwiGLU(quantize(both, "int8"), plain[1]),
        "dense above": SwiGLU(plain[0], quantize(down, "int4")),
        "apart": SwiGLU(
            (quantize(gate, "int8"), quantised(inter, d, "int8", 64, scale=torch.float32)), quantize(down, "int8")
        ),
    }
    return {
        name: (expert, SwiGLU(*(_exact(part) for part in (expert.gate_up, expert.down))))
        for name, expert in made.items()
    }


def _exact(matrix: object) -> Tensor:
    if isinstance(matrix, tuple):
        return torch.cat([_exact(part) for part in matrix])
    return matrix.dequantize(torch.float64) if isinstance(matrix, QTensor) else matrix.double()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["int8", "int4", "mixed", "dense below", "dense above", "apart"])
@pytest.mark.parametrize("rows", [3, 30])
def test_experts_are_as_exact_as_torchs(dtype: torch.dtype, form: str, rows: int) -> None:
    expert, exact = forms_of_experts(96, 160, dtype)[form]
    assert expert.places is not None
    assert expert.places.take(dtype)
    x = random(rows, 96, dtype=dtype, seed=9)
    got = products.swiglu(x, expert.places)
    want = exact(x.double())
    gate, up = F.linear(x, exact.gate_up.to(dtype)).chunk(2, dim=-1)  # type: ignore[union-attr]
    torchs = F.linear(F.silu(gate) * up, exact.down.to(dtype))  # type: ignore[union-attr]
    assert (got - want).norm() <= 1.5 * (torchs - want).norm()
    one = products.swiglu(x[2:3], expert.places)
    assert torch.equal(one[0], got[2])


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_many_experts_are_as_each_alone(form: str) -> None:
    experts = [forms_of_experts(64, 96, torch.bfloat16)[form][0], forms_of_experts(64, 96, torch.float32)[form][0]]
    experts.append(SwiGLU(*(quantize(random(*shape, seed=8), form) for shape in ((192, 64), (64, 96)))))  # type: ignore[arg-type]
    alone = {number: one.places for number, one in enumerate(experts, 2) if one.places}
    assert_each_as_alone(ExpertPlaces.together(alone), alone)


def test_unlike_experts_are_not_put_together() -> None:
    some = forms_of_experts(64, 96, torch.float32)
    alone = {number: some[form][0].places for number, form in enumerate(("int8", "int4"))}
    assert ExpertPlaces.together({number: one for number, one in alone.items() if one}) is None
    unlike = quantize(random(96, 64), "int8"), quantize(random(96, 64), "int4")
    assert ExpertPlaces.of(unlike, quantize(random(64, 96), "int8")) is None
    assert ExpertPlaces.of(random(192, 64), random(64, 96).bfloat16()) is None


def test_what_they_take() -> None:
    good = quantised(4, 64, "int8")
    assert weight_kind(good) is not None
    assert products.usable(random(1, 64), good)
    assert not products.usable(random(1, 64).half(), good)
    columns = torch.arange(64)
    refused = [
        replace(good, columns=columns),
        quantised(4, 64, "int8", group=16),
        quantised(4, 96, "int4", group=48),
        quantised(4, 40, "int4", group=40),
        quantised(4, 0, "int8"),
        quantize(random(4, 64), "fp8"),
        replace(good, data=good.data.repeat(1, 2)[:, ::2]),
        good.to("meta"),
    ]
    assert [weight_kind(weight) for weight in refused] == [None] * len(refused)
