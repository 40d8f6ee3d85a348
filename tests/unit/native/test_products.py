"""The kernels against exact sums, on every instruction set that this machine has."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.native import products
from actors.native.expert_places import ExpertPlaces
from actors.native.matrix import Weight
from tests.kernels import INSTRUCTION_SETS, use

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (1, 32, 3), (5, 70, 100), (9, 576, 961), (17, 2049, 33), (130, 300, 50), (70, 1000, 200)]
"""Rows, K and N: tails of all three, and rows that fit in a cache and not."""


pytestmark = pytest.mark.usefixtures("isa", "two_threads")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_kernels_are_built() -> None:
    """Else nothing here would be tested: whoever tests has a compiler."""
    assert "portable" in INSTRUCTION_SETS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_as_exact_as_torchs(dtype: torch.dtype, rows: int, k: int, n: int, biased: bool) -> None:
    x, weight = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    bias = random(n, dtype=dtype, seed=2) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ours = (products.linear(x, weight, bias) - exact).abs().max()
    unit = torch.finfo(dtype).eps * exact.abs().max()
    # One rounding to bf16 at the end; fp32 sums of up to 129 terms in each of 16 lanes.
    assert ours <= unit * (0.51 if dtype == torch.bfloat16 else 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_a_row_does_not_know_its_mates(dtype: torch.dtype, rows: int, k: int, n: int) -> None:
    x, weight = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    together = products.linear(x, weight)
    for i in range(rows):
        assert torch.equal(products.linear(x[i : i + 1], weight)[0], together[i])
    torch.set_num_threads(1)
    assert torch.equal(products.linear(x, weight), together)
    assert torch.equal(products.linear(x[: rows // 2], weight), together[: rows // 2])


def test_fused_multiply_add_gives_the_same_everywhere(isa: str) -> None:
    """Nodes of one cluster may differ: in fp32 they agree, unless one has no FMA at all."""
    if isa == "portable":
        pytest.skip("portable: no fused multiply-add there, so its last bits are others")
    x, weight = random(9, 333, dtype=torch.float32), random(40, 333, dtype=torch.float32, seed=1)
    sums = torch.zeros(9, 40, 16)
    for i in range(0, 336, 16):
        part = slice(i, min(i + 16, 333))
        width = part.stop - part.start
        step = x[:, None, part].double() * weight[None, :, part].double() + sums[..., :width].double()
        sums[..., :width] = step.float()
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    assert torch.equal(products.linear(x, weight), sums[..., 0])


def test_experts_are_the_same_wherever_there_is_fused_multiply_add(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in ("avx512", "avx512_bf16"):
        pytest.skip(f"{isa}: compared with avx2 is what is wider")
    (weights,) = expert_weights(1, 96, 97, torch.float32)
    weights = [tensor.contiguous() for tensor in weights]
    places = together([weights])
    pairs = torch.arange(9), torch.zeros(9, dtype=torch.int64)
    x = random(9, 96, dtype=torch.float32)
    wide = products.experts(x, *pairs, places)
    use("avx2", monkeypatch)
    other = products.experts(x, *pairs, places)
    assert isinstance(wide, Tensor)
    assert isinstance(other, Tensor)
    assert torch.equal(wide, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_slices(dtype: torch.dtype) -> None:
    wide, weight = random(6, 200, dtype=dtype), random(48, 100, dtype=dtype, seed=1)
    assert torch.equal(products.linear(wide[:, 3:103], weight), products.linear(wide[:, 3:103].contiguous(), weight))
    turned = random(100, 6, dtype=dtype).T
    assert torch.equal(products.linear(turned, weight), products.linear(turned.contiguous(), weight))
    assert torch.equal(products.linear(wide[:, :100], weight[5:9]), products.linear(wide[:, :100], weight)[:, 5:9])
    assert products.linear(wide[:0, :100], weight).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    x, weight = random(10, 70, dtype=dtype), random(30, 70, dtype=dtype, seed=1)
    want = products.linear(x, weight)
    x[3, 69], x[4, 0] = float("nan"), float("inf")
    got = products.linear(x, weight)
    assert got[3].isnan().all()
    assert not got[4].isfinite().any()
    kept = [i for i in range(10) if i not in (3, 4)]
    assert torch.equal(got[kept], want[kept])


def test_bf16_is_rounded_to_nearest_even() -> None:
    eye = torch.eye(32, dtype=torch.bfloat16)
    x = torch.cat((random(1, 31, dtype=torch.bfloat16), torch.tensor([[3.0e38]], dtype=torch.bfloat16)), 1)
    assert torch.equal(products.linear(x, eye), x)
    halves = torch.tensor([[1.0, 2**-8, 2**-9]], dtype=torch.bfloat16)
    ways = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 3, 0]], dtype=torch.bfloat16)
    want = (halves.double() @ ways.double().T).to(torch.bfloat16)
    assert torch.equal(products.linear(halves, ways), want)


def expert_weights(count: int, d: int, inter: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [
        (random(2 * inter, d, dtype=dtype, seed=2 * e) / d**0.5, random(d, inter, dtype=dtype, seed=2 * e + 1))
        for e in range(count)
    ]


def together(experts: Sequence[Sequence[Weight]], *, first: int = 0) -> ExpertPlaces:
    """(gate over up, down) of each, numbered from ``first``; the caller keeps them alive."""
    single = {number: ExpertPlaces.of(*weights) for number, weights in enumerate(experts, first)}
    places = ExpertPlaces.together({number: one for number, one in single.items() if one is not None})
    assert places is not None
    assert len(places) == first + len(experts)
    return places


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "inter", "rows"), [(64, 32, 5), (70, 29, 3), (256, 200, 60), (96, 97, 200)])
def test_experts_are_as_exact_as_torchs(dtype: torch.dtype, d: int, inter: int, rows: int) -> None:
    weights = expert_weights(6, d, inter, dtype)
    x = random(rows, d, dtype=dtype, seed=50)
    generator = torch.Generator().manual_seed(3)
    pair_row = torch.randint(rows, (3 * rows,), generator=generator, dtype=torch.int32)
    pair_expert = torch.randint(6, (3 * rows,), generator=generator, dtype=torch.int32)
    places = together(weights)
    out = products.experts(x, pair_row, pair_expert, places)
    assert isinstance(out, Tensor)
    chosen = list(zip(x[pair_row], pair_expert.tolist(), strict=True))
    exact = torch.stack([swiglu(row.double(), *(w.double() for w in weights[e])) for row, e in chosen])
    torchs = torch.stack([swiglu(row, *weights[e]) for row, e in chosen])
    assert (out - exact).norm() <= 1.5 * (torchs - exact).norm()
    one = products.experts(x[pair_row[4]][None], pair_row[:1] * 0, pair_expert[4:5], places)
    assert isinstance(one, Tensor)
    assert torch.equal(one[0], out[4])


def test_gates_of_all_sizes() -> None:
    """silu is exact to rounding from far below zero to far above, where an exponential would overflow."""
    extremes = [0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38, -88.5, -1e4]
    gates = torch.cat((torch.linspace(-200, 200, 4001), torch.tensor(extremes)))
    inter = gates.shape[0]
    gate_up = torch.cat((gates[:, None], torch.ones(inter, 1)))
    down = torch.eye(inter)[:1].contiguous()
    for i in (*range(0, 4001, 37), *range(4001, inter)):
        down[0], down[0, i] = 0, 1
        out = products.swiglu(torch.ones(1, 1), together([(gate_up, down)]))
        torch.testing.assert_close(out[0, 0], F.silu(gates[i].double()).float(), rtol=3e-7, atol=1e-35)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_that_are_no_numbers(dtype: torch.dtype) -> None:
    """As torch has them; far below zero silu is exactly 0."""
    weights = torch.ones(2, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    places = together([weights])
    for gate in (float("nan"), float("inf"), -float("inf"), -3e38, -89.0):
        x = torch.tensor([[gate]]).to(dtype)
        got = products.swiglu(x, places)
        torch.testing.assert_close(got, swiglu(x, *weights), equal_nan=True, rtol=0, atol=0)


def test_an_expert_that_is_not_held_is_named() -> None:
    ((gate_up, down),) = expert_weights(1, 8, 4, torch.float32)
    held = together([(gate_up, down)], first=1)
    for missing in (0, 2, -1):
        pairs = torch.tensor([0, 0]), torch.tensor([1, missing])
        assert products.experts(torch.ones(1, 8), *pairs, held) == missing
    for row in (1, -1):
        with pytest.raises(IndexError, match=rf"pair 1 has index {row}; there are 1 rows"):
            products.experts(torch.ones(1, 8), torch.tensor([0, row]), torch.tensor([1, 1]), held)
    none = torch.zeros(0, dtype=torch.int64)
    empty = products.experts(torch.ones(1, 8), none, none, held)
    assert isinstance(empty, Tensor)
    assert empty.shape == (0, 8)


def test_threads_that_compute_at_the_same_time() -> None:
    x, weight = random(20, 256, dtype=torch.float32), random(3000, 256, dtype=torch.float32, seed=1)
    want, wrong = products.linear(x, weight), []

    def compute() -> None:
        for _ in range(50):
            if not torch.equal(products.linear(x, weight), want):
                wrong.append(1)

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_they_take() -> None:
    x = torch.ones(1, 4)
    assert products.usable(x, torch.ones(3, 4), torch.ones(5, 4))
    assert not products.usable(x.half(), torch.ones(3, 4).half())
    assert not products.usable(x, torch.ones(3, 4).bfloat16())
    assert not products.usable(x, torch.ones(4, 3).T)
    assert not products.usable(x.to("meta"), torch.ones(3, 4))
    assert not products.usable(x, torch.ones(3, 4), torch.ones(3, 4, device="meta"))


def test_which_bias_they_add() -> None:
    x, weight, bias = torch.ones(2, 4), torch.ones(3, 4), torch.arange(3.0)
    assert products.adds(None, x, weight)
    assert products.adds(bias, x, weight)
    for other in (bias.bfloat16(), torch.arange(6.0)[::2], torch.ones(1).expand(3), bias[:2], bias.to("meta")):
        assert not products.adds(other, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_nothing(dtype: torch.dtype) -> None:
    x, weight, bias = torch.ones(2, 0, dtype=dtype), torch.ones(30, 0, dtype=dtype), random(30, dtype=dtype)
    assert torch.equal(products.linear(x, weight, bias), bias.expand(2, 30))
    assert products.linear(torch.ones(2, 4, dtype=dtype), torch.ones(0, 4, dtype=dtype)).shape == (2, 0)
    assert ExpertPlaces.of(torch.ones(0, 8, dtype=dtype), torch.ones(8, 0, dtype=dtype)) is None


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="x has 4096 columns, the weight 40"):
        products.linear(torch.ones(2, 4096), torch.ones(3, 40))
    with pytest.raises(ValueError, match="x has 32 columns, the experts take 64"):
        products.swiglu(torch.ones(1, 32), together([(torch.ones(8, 64), torch.ones(64, 4))]))


def test_experts_whose_shapes_do_not_fit_are_not_taken() -> None:
    gate, up, down = torch.ones(4, 64), torch.ones(4, 64), torch.ones(64, 4)
    good = ExpertPlaces.of(torch.ones(8, 64), down)
    assert good is not None
    assert ExpertPlaces.of((gate, up), down) is not None
    assert ExpertPlaces.of((gate, up[:3]), down) is None
    assert ExpertPlaces.of((gate[:3], up), down) is None
    assert ExpertPlaces.of(torch.ones(6, 64), down) is None
    assert ExpertPlaces.of(torch.ones(8, 32), down) is None
    assert ExpertPlaces.of(torch.ones(8, 64), down.to("meta")) is None
    narrow = ExpertPlaces.of(torch.ones(6, 64), torch.ones(64, 3))
    assert narrow is not None
    assert ExpertPlaces.together({0: good, 1: narrow}) is None


@pytest.mark.parametrize(
    ("isa", "said"), [("avx9", "EXPERTMESH_ISA: 'avx9'; here it may be "), ("none", "None"), ("portable", "portable")]
)
def test_the_instruction_set_can_be_chosen(isa: str, said: str) -> None:
    shown = "from actors.native.library import library; found = library(); print(found and found.isa)"
    ran = subprocess.run([sys.executable, "-c", shown], env={"EXPERTMESH_ISA": isa}, capture_output=True, text=True)
    assert said in ran.stdout + ran.stderr
    assert (ran.returncode == 0) == (isa != "avx9")
