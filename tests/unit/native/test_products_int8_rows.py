"""Products with rows that become int8 as they come: the same bits on every instruction set, and torch's integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.model.mlp import SwiGLU
from actors.model.quant.int8_product import int8_linear, quantize_rows
from actors.model.quant.qtensor import QTensor
from actors.model.quant.quantize import quantize
from actors.native import products
from actors.native.expert_places import ExpertPlaces
from actors.native.matrix import W4A8, W8A8, weight_kind
from actors.quant_kind import QuantKind
from tests.experts_alone import assert_each_as_alone
from tests.kernels import use

pytestmark = pytest.mark.usefixtures("isa", "two_threads")

FORMS = [
    ("int8", 128, 128, False, torch.bfloat16),
    ("int8", 32, 96, False, torch.bfloat16),
    ("int8", 96, 96, True, torch.float16),
    ("int8", 2**16, 2**16, True, torch.float32),
    ("int8", 2**16, 2**16, False, torch.bfloat16),
    ("int4", 32, 128, True, torch.bfloat16),
    ("int4", 32, 32, False, torch.float16),
    ("int4", 64, 2**16, True, torch.float32),
    ("int4", 2**16, 2**16, False, torch.float32),
]
"""Kind, columns of a group and of a row's group, whether there are zero points, and what scales are kept in."""

SHAPES = [(1, 32, 1), (2, 64, 15), (3, 160, 17), (4, 320, 33), (5, 320, 100), (8, 512, 48), (21, 800, 70)]
"""Rows, K and N: blocks of 16 weights alone, in pairs and in part, a group or a row's group that is shorter."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of many sizes."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) * torch.logspace(-3, 3, shape[0])[:, None]).to(dtype)


def quantised(
    n: int, k: int, kind: str, group: int, row_group: int, zeros: bool = False, scale: torch.dtype = torch.bfloat16
) -> QTensor:
    draw = torch.Generator().manual_seed(5)
    signed = kind == "int8"
    groups = n, -(-k // group)
    data = torch.randint(0, 256, (n, k if signed else k // 2), generator=draw, dtype=torch.uint8)
    zero = torch.randint(0, 256 if signed else 121, groups, generator=draw, dtype=torch.uint8)
    numbers = torch.int8 if signed else torch.uint8
    scales = torch.rand(groups, generator=draw).add_(0.1).mul_(0.01).to(scale)
    return QTensor(
        kind,  # type: ignore[arg-type]
        data.view(numbers),
        scales,
        group,
        zero.view(numbers) if zeros else None,
        row_group=row_group,
    )


@pytest.fixture
def portably(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, QTensor], Tensor]:
    """:func:`products.linear` without any instructions of this CPU's own."""

    def linear(x: Tensor, weight: QTensor) -> Tensor:
        with monkeypatch.context() as patch:
            use("portable", patch)
            return products.linear(x, weight)

    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_they_are_torchs_products_of_integers(
    dtype: torch.dtype,
    form: tuple[str, int, int, bool, torch.dtype],
    rows: int,
    k: int,
    n: int,
    portably: Callable[[Tensor, QTensor], Tensor],
) -> None:
    x, weight = random(rows, k, dtype=dtype), quantised(n, k, *form)
    assert products.usable(x, weight)
    got = products.linear(x, weight)
    assert torch.equal(got, portably(x, weight))
    want, wide = int8_linear(x.float(), weight), products.linear(x.float(), weight)
    assert ((wide - want).abs() <= 1e-6 * want.abs().amax(1, keepdim=True)).all()
    assert torch.equal(got, wide.to(dtype))


def test_rows_are_rounded_as_torch_does_it() -> None:
    """Every weight picks a column of its own: what comes out is what became of it."""
    ties = (torch.arange(64.0) - 32.25) * 2
    rows = [random(6, 64), ties[None] / 127.5, torch.zeros(1, 64), torch.full((1, 64), -3.0)]
    tiny = torch.full((1, 64), 1e-44)
    tiny[0, 3], tiny[0, 4] = 1.5e-43, -1.5e-43
    x = torch.cat([*rows, tiny])
    weight = QTensor("int8", torch.eye(64, dtype=torch.int8), torch.ones(64, 2), 32, row_group=32)
    numbers, scale = quantize_rows(x, 32)
    assert torch.equal(products.linear(x, weight), numbers * scale.repeat_interleave(32, 1))
    assert numbers.min() == -128
    assert numbers.max() == 127


def test_the_largest_sums() -> None:
    k = 2**16
    x = torch.full((2, k), -255.0)  # in steps of 2 each is -127.5, and -128 is even
    weight = QTensor(
        "int8",
        torch.full((2, k), -128, dtype=torch.int8),
        torch.ones(2, 1),
        k,
        torch.tensor([[127], [0]], dtype=torch.int8),
        row_group=k,
    )
    want = torch.tensor([255.0 * 128 * k, 128.0 * 128 * k]) * 2
    assert torch.equal(products.linear(x, weight), want.expand(2, 2))


@pytest.mark.parametrize("form", [form for form in FORMS if form[1] <= 128])
@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (13, 160)])
def test_lanes_have_the_bits_of_rows(form: tuple[str, int, int, bool, torch.dtype], rows: int, n: int) -> None:
    x, weight = random(rows, 416, dtype=torch.bfloat16), quantised(n, 416, *form)
    assert weight.fits_lanes
    want = products.linear(x, weight)
    assert torch.equal(products.linear(x, weight.in_lanes()), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("lanes", [False, True])
def test_a_row_does_not_know_its_mates(dtype: torch.dtype, kind: str, lanes: bool) -> None:
    x, weight, bias = random(50, 416, dtype=dtype), quantised(96, 416, kind, 32, 128), random(1, 96, dtype=dtype)[0]
    weight = weight.in_lanes() if lanes else weight
    together = products.linear(x, weight, bias)
    assert torch.equal(together, (products.linear(x.float(), weight) + bias.float()).to(dtype))
    for count in (*range(1, 18), 49):
        assert torch.equal(products.linear(x[:count], weight, bias), together[:count])
    torch.set_num_threads(1)
    assert torch.equal(products.linear(x[7:19], weight, bias), together[7:19])
    assert torch.equal(products.linear(x[:, :].T.contiguous().T[5:9], weight, bias), together[5:9])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [4, 20])
def test_what_is_not_finite_stays_in_its_row(kind: str, rows: int) -> None:
    x, weight = random(rows, 160), quantised(30, 160, kind, 32, 64)
    want = products.linear(x, weight)
    x[2, 95], x[3, 0] = float("nan"), float("-inf")
    got = products.linear(x, weight)
    assert not got[2:4].isfinite().any()
    kept = [i for i in range(rows) if i not in (2, 3)]
    assert torch.equal(got[kept], want[kept])


def expert(kind: QuantKind, d: int, inter: int, lanes: bool = False, seed: int = 1) -> SwiGLU:
    draw = torch.Generator().manual_seed(seed)
    both, down = (quantize(torch.randn(*shape, generator=draw) / 8, kind) for shape in ((2 * inter, d), (d, inter)))
    return SwiGLU(both.in_lanes(), down.in_lanes()) if lanes else SwiGLU(both, down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["w8a8", "w4a8"])
@pytest.mark.parametrize(("rows", "inter"), [(3, 160), (30, 416)])
def test_an_expert_is_its_three_products(dtype: torch.dtype, kind: QuantKind, rows: int, inter: int) -> None:
    one, x = expert(kind, 96, inter), random(rows, 96, dtype=dtype, seed=9)
    assert one.places is not None
    got = products.swiglu(x, one.places)
    assert isinstance(one.gate_up, QTensor)
    assert isinstance(one.down, QTensor)
    gate, up = products.linear(x, one.gate_up).chunk(2, dim=-1)
    want = products.linear(F.silu(gate) * up, one.down)
    apart = (got.float() - want.float()).norm(dim=1)
    assert (apart <= 2e-2 * want.float().norm(dim=1)).all()  # silu's last bit may tell which way a number is rounded
    assert apart.median() <= 1e-2 * want.float().norm(dim=1).median()


@pytest.mark.parametrize("kind", ["w8a8", "w4a8"])
@pytest.mark.parametrize("lanes", [False, True])
def test_many_experts_are_as_each_alone(kind: QuantKind, lanes: bool) -> None:
    experts, plain = ([expert(kind, 64, 160, some, seed) for seed in range(3)] for some in (lanes, False))
    places = ExpertPlaces.together({number: one.places for number, one in enumerate(experts, 2) if one.places})
    assert_each_as_alone(places, {number: one.places for number, one in enumerate(plain, 2) if one.places})


def test_rows_that_become_int8_in_two_ways_are_not_put_together() -> None:
    one, other = expert("w8a8", 256, 288), expert("w8a8", 256, 288)
    assert isinstance(other.gate_up, QTensor)
    assert isinstance(other.down, QTensor)
    for unlike in (
        SwiGLU(replace(other.gate_up, row_group=2**16), other.down),
        SwiGLU(other.gate_up, replace(other.down, row_group=256)),
    ):
        assert unlike.places is not None
        assert one.places is not None
        assert ExpertPlaces.together({0: one.places, 1: unlike.places}) is None
    gate, up = (quantised(288, 256, "int8", 32, row_group) for row_group in (32, 64))
    assert SwiGLU((gate, up), other.down).places is None
    assert SwiGLU((gate, gate), other.down).places is not None


def test_what_they_take() -> None:
    good = quantised(32, 64, "int8", 32, 32)
    assert weight_kind(good) == weight_kind(good.in_lanes()) == W8A8
    assert weight_kind(quantised(4, 64, "int4", 32, 64)) == W4A8
    refused = [quantised(4, 96, "int4", 48, 96), quantised(4, 40, "int4", 40, 40), quantised(4, 0, "int8", 32, 32)]
    assert [weight_kind(weight) for weight in refused] == [None] * len(refused)
