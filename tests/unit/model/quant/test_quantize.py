from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.model.quant.qtensor import ZERO_PARTS, QTensor
from actors.model.quant.quantize import GROUP, TINY, quantize, quantized_bytes
from actors.quant_kind import NUMBER_KINDS, NUMBERS, QUANT_KINDS
from tests.kernels import INSTRUCTION_SETS, use

KINDS = NUMBER_KINDS
SYMMETRIC = ["int8", "fp8"]


def draw(rows: int, half_width: int, magnitude: float, offset: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 2 * half_width, generator=generator).clamp(-3, 3) * 0.3 + offset
    return weight * (magnitude / max(1.0, abs(offset)))


def over_the_whole_range(weight: Tensor) -> Tensor:
    """Plain 4-bit rounding: 16 steps from each group's smallest to its largest number, 0 always among them."""
    rounded = []
    for group in weight.split(GROUP["int4"], dim=1):
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        step = (high / 15 - low / 15).bfloat16().clamp(min=torch.finfo(torch.bfloat16).tiny).float()
        zero = (-low / step).round().clamp(0, 15)
        rounded.append(((group / step).round() + zero).clamp(0, 15).sub(zero) * step)
    return torch.cat(rounded, 1)


def error_and_bound(weight: Tensor, kind: Any) -> tuple[Tensor, Tensor]:
    """|W - dequantised|, and what it may be in int8 and fp8: half a step of the group (fp8: of the element), but for
    the rounding of fp32."""
    q = quantize(weight, kind)
    error = (weight.double() - q.dequantize(torch.float32).double()).abs()
    step = q.scale.double().repeat_interleave(q.group, 1)[:, : weight.shape[1]]
    if kind == "fp8":
        # e4m3 has 3 bits behind the point, and its subnormal numbers are multiples of 2**-9.
        half = torch.maximum(weight.double().abs() * 2.0**-4, step * 2.0**-10)
    else:
        half = step / 2
    return error, half * (1 + 1e-5)


def student(*shape: int, generator: torch.Generator) -> Tensor:
    """Three degrees of freedom."""
    normal, *others = (torch.randn(*shape, generator=generator) for _ in range(4))
    return normal / torch.stack(others).square().mean(0).sqrt()


def sparse(*shape: int, generator: torch.Generator) -> Tensor:
    """Half of it 0."""
    return torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < 0.5)


MATRICES = st.builds(
    draw,
    rows=st.integers(1, 9),
    half_width=st.integers(1, 150),
    magnitude=st.sampled_from([1e-42, 1e-38, 1e-6, 1.0, 300.0, 1e30, 1e38]),
    offset=st.sampled_from([0.0, 1.0, -1.0, 300.0, -300.0]),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("kind", SYMMETRIC)
@settings(max_examples=60, deadline=None)
@given(weight=MATRICES)
def test_no_element_is_off_by_more_than_half_a_step(kind: Any, weight: Tensor) -> None:
    error, bound = error_and_bound(weight, kind)
    assert (error <= bound).all()


def errors_of_groups(weight: Tensor, rounded: Tensor) -> Tensor:
    """Sums of squares [n, groups], relative to those of the weights."""
    parts = [t.double().split(GROUP["int4"], dim=1) for t in (weight - rounded, weight)]
    errors, sizes = (torch.stack([part.square().sum(1) for part in split], 1) for split in parts)
    return errors / sizes.clamp(min=torch.finfo(torch.float64).tiny)


@settings(max_examples=60, deadline=None)
@given(weight=MATRICES)
def test_no_group_of_int4_is_much_worse_than_rounded_over_its_whole_range(weight: Tensor) -> None:
    """But for luck in 32 roundings, as no range that is tried has quite its steps. No number is off by more than the
    part of a range that is cut off and half a step; what is below the smallest scale is nothing."""
    got = quantize(weight, "int4").dequantize(torch.float32)
    if weight.abs().max() < 100 * TINY:
        assert (got - weight).abs().max() <= TINY
        return
    for part, rounded in zip(weight.split(GROUP["int4"], dim=1), got.split(GROUP["int4"], dim=1), strict=True):
        step = part.amax(1).clamp(min=0) / 15 - part.amin(1).clamp(max=0) / 15
        assert ((rounded - part).abs() <= 2.2 * step[:, None]).all()
    full = weight.shape[1] // GROUP["int4"]
    wanted = errors_of_groups(weight, over_the_whole_range(weight))[:, :full]
    assert (errors_of_groups(weight, got)[:, :full] <= 2 * wanted + 1e-6).all()


@pytest.mark.parametrize("draw_from", [torch.randn, student, sparse], ids=["normal", "heavy tails", "sparse"])
def test_int4_is_closer_than_with_whole_ranges(draw_from: Callable[..., Tensor]) -> None:
    """Of normal weights by a fifth of the squared error: its root is 7.1 % of them instead of 8.0 %."""
    weight = draw_from(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    error = (weight - quantize(weight, "int4").dequantize(torch.float32)).norm() / weight.norm()
    before = (weight - over_the_whole_range(weight)).norm() / weight.norm()
    assert error < (0.97 if draw_from is sparse else 0.92) * before
    assert draw_from is not torch.randn or 0.071 < error < 0.072


@pytest.mark.parametrize("steps_above_0", [1.0, 7.0, 7.5])
def test_weights_of_four_bits_stay_as_they_are(steps_above_0: float) -> None:
    """As those trained for it, which lie on -7 .. 7 or -8 .. 7 times a scale of their group, and ternary ones do."""
    weight = torch.randn(64, 16, GROUP["int4"], generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(-1, keepdim=True) / steps_above_0
    weight = ((weight / scale).round().clamp(-8, 7) * scale).flatten(1)
    got = quantize(weight, "int4").dequantize(torch.float32)
    assert (got - weight).norm() / weight.norm() < 0.003  # the scale in bf16


def without_kernels(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> QTensor:
    with monkeypatch.context() as patch:
        patch.setattr("actors.native.quantize.library", lambda: None)
        return quantize(weight, "int4")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 30, 64, 512, 514, 1408])
def test_the_kernels_find_the_same_int4_as_torch(
    isa: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where a sum in another order decides how a number or a zero point is rounded."""
    use(isa, monkeypatch)
    weight = student(70, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)[:, :width]
    weight[3], weight[4, : width // 2], weight[5] = 0.0, 3.0, weight[5].abs()
    found, wanted = quantize(weight, "int4"), without_kernels(weight, monkeypatch)
    for name in ("data", "scale", "zero"):
        got, reference = getattr(found, name), getattr(wanted, name)
        assert (got == reference).float().mean() > 0.99, name
    error, reference = (float((weight - made.dequantize(torch.float32)).norm()) for made in (found, wanted))
    assert error == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_threads_and_a_transposed_matrix_change_nothing(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(isa, monkeypatch)
    weight = torch.randn(2048, 640, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = quantize(weight, "int4")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for other in (quantize(weight, "int4"), quantize(weight.T.contiguous().T, "int4")):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("data", "scale", "zero"))


@pytest.mark.parametrize("kind", SYMMETRIC)
def test_the_largest_numbers_there_are(kind: Any) -> None:
    weight = torch.tensor([[3.3e38, -3.3e38, 1e38, 0.0]])
    error, bound = error_and_bound(weight, kind)
    assert (error <= bound).all()


def test_zero_points_have_four_bits() -> None:
    for sign in (1, -1):
        weight = sign * (100 + torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
        zero = quantize(weight, "int4").zero
        assert zero is not None
        assert (zero == (0 if sign == 1 else 15 * ZERO_PARTS["int4"])).all()


@pytest.mark.parametrize("kind", SYMMETRIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_step_is_no_larger_than_the_range_asks_for(kind: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = quantize(weight, kind)
    width = q.group
    for index in range(q.scale.shape[1]):
        part = weight[:, index * width : (index + 1) * width].float()
        step = part.abs().amax(1) / {"int8": 127, "fp8": 448}[kind]
        ratio = q.scale[:, index].float() / step
        assert ratio.min() >= 1 - 1e-6
        assert ratio.max() <= 1 + 2**-7


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero(kind: Any) -> None:
    weight = torch.zeros(3, 2 * GROUP[kind] + 2)
    weight[1, 0] = 1.0
    got = quantize(weight, kind).dequantize(torch.float32)
    assert torch.equal(got == 0, weight == 0)
    assert got[1, 0] == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible_in_its_group_alone(kind: Any, bad: float) -> None:
    weight = torch.randn(2, 3 * GROUP[kind], generator=torch.Generator().manual_seed(0))
    want = quantize(weight, kind).dequantize(torch.float32)
    weight[0, 5] = bad
    got = quantize(weight, kind).dequantize(torch.float32)
    assert not got[0, 5].isfinite()
    got[0, : GROUP[kind]] = want[0, : GROUP[kind]]
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_large_matrices_are_done_piece_by_piece_with_the_same_result(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, kind)
    monkeypatch.setattr("actors.model.quant.quantize.TILE_BYTES", 70 * 4 * 7)
    pieces = quantize(weight, kind)
    assert torch.equal(pieces.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert torch.equal(pieces.scale, whole.scale)
    assert torch.equal(pieces.dequantize(torch.float32), whole.dequantize(torch.float32))


def test_bytes_of_an_element() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    assert {kind: quantize(weight, kind).nbytes / weight.numel() for kind in ("int8", "int4", "fp8")} == {
        "int8": 1 + 2 / 128,
        "int4": 0.5 + 3 / 32,
        "fp8": 1 + 2 / 128,
    }
    for kind in QUANT_KINDS:
        for shape in ((64, 1024), (3, 130), (1, 2)):
            assert quantized_bytes(shape, kind) == quantize(torch.zeros(shape), kind).nbytes


@pytest.mark.parametrize("kind", ["w8a8", "w4a8"])
def test_kinds_with_int8_rows_have_the_numbers_of_those_without(kind: Any) -> None:
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    got, want = quantize(weight, kind), quantize(weight, NUMBERS[kind])
    assert (got.row_group, want.row_group) == (128, 0)
    assert torch.equal(got.data, want.data)
    assert torch.equal(got.dequantize(torch.float32), want.dequantize(torch.float32))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="weight has 7 columns: allowed is an even number"):
        quantize(torch.zeros(2, 7), "int4")
    with pytest.raises(ValueError, match="weight has 7 columns: allowed is an even number"):
        quantize(torch.zeros(2, 7), "w4a8")
    quantize(torch.zeros(2, 7), "int8")
    with pytest.raises(ValueError, match="kind is 'int2'"):
        quantize(torch.zeros(2, 8), "int2")  # type: ignore[arg-type]
    for weight in (torch.zeros(8), torch.zeros(2, 8, dtype=torch.int8)):
        with pytest.raises(ValueError, match="allowed is a floating"):
            quantize(weight, "int8")
