from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from actors.model.linear import linear
from actors.model.quant.int8_product import exact_matmul, int8_linear, int_matmul, quantize_rows
from actors.model.quant.qtensor import QTensor

TOKEN = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)


LARGEST_SUMS = """
import torch
from actors.model.quant.int8_product import int_matmul
a, b = torch.full((8, 1024), 127, dtype=torch.int8), torch.full((96, 1024), 127, dtype=torch.int8)
b[48:] = -128
products = int_matmul(a, b)
assert (products[:, :48] == products[0, 0]).all() and (products[:, 48:] == products[0, 48]).all()
print(products[0, 0].item(), products[0, 48].item())
"""


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-4, 3, count)[:, None]


def int8(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def matrix(n: int, width: int, group: int, zero: bool = False, row_group: int = 2**16, kind: Any = "int8") -> QTensor:
    groups = (n, -(-width // group))
    scale = torch.rand(groups, generator=torch.Generator().manual_seed(5)) + 0.5
    data, zeros = int8((n, width), 3), int8(groups, 4)
    if kind == "int4":
        data, zeros = data[:, : width // 2].contiguous().view(torch.uint8), zeros.view(torch.uint8) % 121
    return QTensor(kind, data, scale, group, zeros if zero else None, row_group=row_group)


def test_rows_are_quantised_as_compressed_tensors_does_it() -> None:
    x = torch.cat((rows(20, 96), torch.zeros(1, 96), torch.full((1, 96), 1e-44), torch.arange(96.0)[None] - 48))
    scale, zero = compute_dynamic_scales_and_zp(x[None], TOKEN, torch.nn.Identity())
    want = fake_quantize(x[None], scale, zero, TOKEN)[0]
    got, got_scale = quantize_rows(x, 96)
    assert torch.equal(got_scale, scale[0])
    assert torch.equal(got.float() * got_scale, want)
    assert got.min() == -128
    assert got.max() == 127


def test_groups_of_a_row_are_quantised_as_rows_are() -> None:
    x = rows(5, 100)
    got, scale = quantize_rows(x, 32)
    assert scale.shape == (5, 4)
    for index, part in enumerate(x.split(32, 1)):
        numbers, alone = quantize_rows(part, 32)
        assert torch.equal(got[:, 32 * index : 32 * index + 32], numbers)
        assert torch.equal(scale[:, index], alone[:, 0])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (1, 64, 8), (40, 2048, 24), (2, 3000, 16), (0, 8, 8)])
def test_products_are_exact(shape: tuple[int, int, int]) -> None:
    count, width, n = shape
    a, b = int8((count, width), 1), int8((n, width), 2)
    want = a.long() @ b.long().T
    assert torch.equal(int_matmul(a, b).long(), want)
    assert torch.equal(exact_matmul(a, b).long(), want)


@pytest.mark.parametrize("product", [int_matmul, exact_matmul])
def test_the_largest_sums_are_exact(product: object) -> None:
    a = torch.full((2, 4096), -128, dtype=torch.int8)
    assert callable(product)
    assert product(a, a).tolist() == [[128 * 128 * 4096] * 2] * 2
    b = torch.full((1, 4095), 127, dtype=torch.int8)
    assert product(b, b).tolist() == [[127 * 127 * 4095]]


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", "DEFAULT"])
def test_products_are_exact_on_every_cpu(isa: str) -> None:
    """Without VNNI oneDNN's own product saturates at 16 bits. What a process may use is settled when it starts."""
    result = subprocess.run(
        [sys.executable, "-c", LARGEST_SUMS],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout.strip()) == (0, f"{127 * 127 * 1024} {-128 * 127 * 1024}"), result.stderr


@pytest.mark.parametrize("group", [96, 32, 40])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_product_of_what_was_quantised(group: int, zero: bool, dtype: torch.dtype) -> None:
    x, weight = rows(11, 96).to(dtype), matrix(24, 96, group, zero)
    scale, zero_point = compute_dynamic_scales_and_zp(x[None].float(), TOKEN, torch.nn.Identity())
    quantised = fake_quantize(x[None].float(), scale, zero_point, TOKEN)[0]
    want = F.linear(quantised.double(), weight.dequantize(torch.float64))
    got = int8_linear(x, weight)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert ((got.double() - want).abs() <= tolerance * want.abs().amax(1, keepdim=True)).all()
    bias = torch.randn(24, generator=torch.Generator().manual_seed(6)).to(dtype)
    apart = (linear(x, weight, bias).double() - (got + bias).double()).abs()
    assert (apart <= 2 * tolerance * (want.abs().amax(1, keepdim=True) + bias.double().abs().max())).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("group", "row_group"), [(32, 96), (32, 32), (40, 80), (160, 160)])
def test_so_it_is_with_groups_of_a_row(kind: Any, zero: bool, group: int, row_group: int) -> None:
    x, weight = rows(6, 160), matrix(24, 160, group, zero, row_group, kind)
    numbers, scale = quantize_rows(x, row_group)
    quantised = numbers.double() * scale.double().repeat_interleave(row_group, 1)[:, :160]
    want = quantised @ weight.dequantize(torch.float64).T
    assert ((int8_linear(x, weight).double() - want).abs() <= 1e-6 * want.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("row_block", [0, 8])
def test_a_row_does_not_see_its_mates(row_block: int) -> None:
    x, weight = rows(33, 160), matrix(24, 160, 64, zero=True)
    whole = linear(x, weight, row_block=row_block)
    for row in range(33):
        assert torch.equal(linear(x[row : row + 1], weight, row_block=row_block)[0], whole[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    x, weight = rows(5, 96), matrix(24, 96, 96)
    want = int8_linear(x, weight)
    x[2, 7] = bad
    got = int8_linear(x, weight)
    assert not got[2].isfinite().any()
    got[2] = want[2]
    assert torch.equal(got, want)


def test_without_the_flag_rows_are_not_quantised() -> None:
    x, weight = rows(5, 96), matrix(24, 96, 96)
    plain = linear(x, replace(weight, row_group=0))
    torch.testing.assert_close(plain, F.linear(x, weight.dequantize(torch.float32)), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(plain, linear(x, weight), rtol=1e-5, atol=1e-5)
