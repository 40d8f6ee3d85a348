from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.model.quant.packing import pack_nibbles, unpack_nibbles
from actors.model.quant.qtensor import MAX_INT8_COLUMNS, ZERO_PARTS, QTensor, can_stack, stack

KINDS = ["int8", "int4", "fp8"]
KINDS_AND_ZERO = [("int8", False), ("int8", True), ("int4", False), ("int4", True), ("fp8", False)]


def draw(kind: Any, rows: int, width: int, group: int, zero: bool = False, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(rows, -(-width // group), generator=generator) + 0.5).bfloat16()
    zeros = None
    if kind == "fp8":
        data = torch.randn(rows, width, generator=generator).to(torch.float8_e4m3fn)
    elif kind == "int8":
        data = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
        zeros = torch.randint(-128, 128, scale.shape, generator=generator, dtype=torch.int8)
    else:
        data = torch.randint(0, 256, (rows, width // 2), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 121, scale.shape, generator=generator, dtype=torch.uint8)
    return QTensor(kind, data, scale, group, zeros if zero else None)


def element_by_element(q: QTensor) -> Tensor:
    """The definition, in double precision."""
    rows, width = q.shape
    out = torch.empty(rows, width, dtype=torch.float64)
    for n in range(rows):
        for j in range(width):
            if q.kind == "int4":
                number = float((int(q.data[n, j // 2]) >> (4 * (j % 2))) & 15)
            else:
                number = float(q.data[n, j])
            zero = (
                float(q.zero[n, j // q.group]) / ZERO_PARTS.get(q.kind, 1)
                if q.zero is not None
                else 8.0 * (q.kind == "int4")
            )
            column = j if q.columns is None else int(q.columns[j])
            out[n, column] = (number - zero) * float(q.scale[n, j // q.group])
    return out


@pytest.mark.parametrize(("kind", "zero"), KINDS_AND_ZERO)
@pytest.mark.parametrize(("width", "group"), [(24, 8), (22, 8), (6, 16), (10, 10), (2, 1)])
def test_it_dequantises_as_defined(kind: Any, zero: bool, width: int, group: int) -> None:
    q = draw(kind, 5, width, group, zero)
    want = element_by_element(q)
    assert torch.equal(q.dequantize(torch.float64), want.float().double())
    assert torch.equal(q.dequantize(torch.bfloat16), want.float().bfloat16())
    columns = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    ordered = replace(q, columns=columns)
    assert torch.equal(ordered.dequantize(torch.float32), element_by_element(ordered).float())


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_the_matrix_piece_by_piece(kind: Any) -> None:
    q = draw(kind, 37, 24, 8)
    for tile_bytes, height in ((1, 1), (24 * 4 * 3, 3), (24 * 4 * 17, 16), (1 << 20, 37)):
        tiles = list(q.tiles(torch.float32, tile_bytes))
        assert [start for start, _ in tiles] == list(range(0, 37, height))
        assert torch.equal(torch.cat([tile for _, tile in tiles]), q.dequantize(torch.float32))


@pytest.mark.parametrize(("kind", "zero"), KINDS_AND_ZERO)
def test_it_tells_what_a_dtype_cannot_hold(kind: Any, zero: bool) -> None:
    """In the middle of a large matrix; where a scale alone leaves it open, the numbers tell."""
    q, told = draw(kind, 3000, 512, 8, zero), set[bool]()
    for scale in (1.0, 250.0, 5000.0, 30_000.0, 65_504.0, 1e6):
        q.scale[1500, 20] = scale
        told.add(q.fits(torch.float16))
        assert q.fits(torch.float16) == bool(q.dequantize(torch.float16).isfinite().all())
        assert q.fits(torch.bfloat16)
    assert told == {True, False}
    assert replace(q, data=q.data[:0], scale=q.scale[:0], zero=None).fits(torch.float16)


def test_dequantising_leaves_it_as_it_was() -> None:
    q = draw("int8", 5, 24, 8, zero=True)
    before = q.data.clone(), q.scale.clone()
    q.dequantize(torch.float32)
    assert torch.equal(q.data, before[0])
    assert torch.equal(q.scale, before[1])


@pytest.mark.parametrize(("kind", "zero"), KINDS_AND_ZERO)
@pytest.mark.parametrize("second", [False, True])
def test_stacked_matrices_are_what_they_were(kind: Any, zero: bool, second: bool) -> None:
    parts = [draw(kind, 3, 22, 8, zero), draw(kind, 4, 22, 8, second and kind != "fp8", seed=1)]
    parts[1] = replace(parts[1], scale=parts[1].scale.half())
    both = stack(parts)
    assert both.shape == (7, 22)
    want = torch.cat([part.dequantize(torch.float32) for part in parts])
    assert torch.equal(both.dequantize(torch.float32), want)
    assert stack([parts[0]]).scale.dtype == torch.bfloat16


def test_what_cannot_be_stacked() -> None:
    q = draw("int8", 3, 16, 8)
    columns = torch.arange(15, -1, -1)
    unlike = [
        draw("fp8", 3, 16, 8),
        draw("int8", 3, 24, 8),
        draw("int8", 3, 16, 4),
        replace(q, columns=columns),
        replace(q, row_group=q.group),
    ]
    for other in unlike:
        assert not can_stack([q, other])
        with pytest.raises(ValueError, match="cannot be stacked"):
            stack([q, other])
    assert not can_stack([replace(q, columns=columns), replace(q, columns=columns.flip(0))])
    assert stack([replace(q, columns=columns), replace(q, columns=columns.clone())]).columns is columns


def test_bytes_and_device() -> None:
    q = draw("int4", 4, 32, 8, zero=True)
    assert q.nbytes == 4 * 16 + 4 * 4 * 2 + 4 * 4
    ordered = replace(q, columns=torch.arange(32))
    assert ordered.nbytes == q.nbytes + 32 * 8
    assert ordered.to("cpu").data is q.data
    moved = ordered.to("meta")
    assert {part.device.type for part in (moved.data, moved.scale, moved.zero, moved.columns)} == {"meta"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "int2"}, "kind is 'int2': allowed is one of int8, int4, fp8"),
        ({"group": 0}, "group is 0"),
        ({"data": torch.zeros(3, 16)}, r"data is torch.float32 \[3, 16\]: allowed for int8 is a matrix of torch.int8"),
        ({"data": torch.zeros(48, dtype=torch.int8)}, r"data is torch.int8 \[48\]"),
        ({"scale": torch.ones(3, 3)}, r"scale is torch.float32 \[3, 3\]: allowed is .* \[3, 2\]"),
        ({"scale": torch.ones(3, 2, dtype=torch.float64)}, "scale is torch.float64"),
        ({"zero": torch.zeros(3, 2, dtype=torch.uint8)}, r"zero is torch.uint8 .*: allowed is torch.int8 \[3, 2\]"),
        ({"zero": torch.zeros(3, 1, dtype=torch.int8)}, r"zero is torch.int8 \[3, 1\]"),
        ({"columns": torch.arange(15)}, r"columns is torch.int64 \[15\]: allowed is torch.int64 \[16\]"),
        ({"columns": torch.arange(16), "row_group": 16}, r"row_group is 16 with kind int8, .*, reorder"),
        ({"row_group": 12}, "row_group is 12: allowed is a multiple of group, which is 8, or at least 16"),
        ({"row_group": -8}, "row_group is -8: allowed is"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(draw("int8", 3, 16, 8), **changes)


def test_other_refusals() -> None:
    fp8 = draw("fp8", 3, 16, 8)
    with pytest.raises(ValueError, match=r"zero is torch.int8 .*: allowed is none"):
        replace(fp8, zero=torch.zeros(3, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="row_group is 8 with kind fp8"):
        replace(fp8, row_group=8)
    wide = MAX_INT8_COLUMNS + 1
    with pytest.raises(ValueError, match="at most 65536 columns"):
        QTensor("int8", torch.zeros(1, wide, dtype=torch.int8), torch.ones(1, 1), wide, row_group=wide)


@pytest.mark.parametrize(("kind", "zero"), KINDS_AND_ZERO[:-1])
@pytest.mark.parametrize(("rows", "width", "group"), [(32, 32, 32), (96, 160, 64), (1056, 64, 64)])
def test_lanes_are_another_order_of_the_same_bytes(kind: Any, zero: bool, rows: int, width: int, group: int) -> None:
    q = replace(draw(kind, rows, width, group, zero), row_group=width)
    assert q.fits_lanes
    want, data = q.dequantize(torch.float32), q.data.clone()
    laid = q.in_lanes()
    assert laid.lanes
    assert not laid.fits_lanes
    assert torch.equal(laid.dequantize(torch.float32), want)
    assert torch.equal(laid.in_rows().data, data)
    assert torch.equal(stack([laid, laid]).dequantize(torch.float32), torch.cat([want, want]))
    four = laid.data.flatten().view(torch.uint8)[: 4 * 17].view(17, 4)
    assert torch.equal(four, torch.cat([data[:16, :4], data[:1, 4:8]]).view(torch.uint8))
    assert torch.equal(laid.scale.flatten()[:16], laid.in_rows().scale[:16, 0])


def test_what_does_not_fit_lanes() -> None:
    q = replace(draw("int8", 32, 64, 32), row_group=64)
    assert q.in_rows() is q
    assert not replace(q, row_group=0).fits_lanes
    assert not replace(draw("int8", 48, 64, 32), row_group=64).fits_lanes
    assert not replace(draw("int8", 32, 48, 48), row_group=48).fits_lanes
    assert not can_stack([q, replace(q, lanes=True)])


def test_nibbles() -> None:
    values = torch.arange(16, dtype=torch.uint8).expand(3, 16)
    assert pack_nibbles(values)[0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(unpack_nibbles(pack_nibbles(values)), values)


def test_scales_of_one_group_are_stacked_as_they_come_from_a_transposed_tensor() -> None:
    """[1, N] transposed counts as contiguous, whatever its strides."""
    scale = torch.arange(1.0, 65.0).to(torch.float16)[None].T.contiguous()
    one = QTensor("int4", torch.full((64, 32), 0x21, dtype=torch.uint8), scale, 64)
    both = stack([one, one])
    assert torch.equal(both.dequantize(torch.float32), one.dequantize(torch.float32).repeat(2, 1))
