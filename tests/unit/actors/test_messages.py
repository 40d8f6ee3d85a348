"""What travels on the wires comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opentelemetry.trace import get_current_span
from torch import Tensor

from actors.frames import Kind, expect_parts
from actors.messages import (
    BatchTimes,
    encode_seconds,
    encode_times,
    indices_from,
    rows_part,
    seconds_from,
    tensor_bytes,
    tensor_from,
    tensor_part,
    times_from,
    traced_parts,
)
from actors.transport.base import Frame, FrameTag, Medium, ProtocolError
from tests.span_recorder import PARENT_ID, TRACEPARENT


def frame(*parts: bytes) -> Frame:
    return Frame(Kind.TOKENS, FrameTag(), tuple(memoryview(part) for part in parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_equal(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = tensor_from(memoryview(bytearray(tensor_bytes(rows))), dtype, 7)
    assert torch.equal(back, rows)
    assert tensor_from(memoryview(b""), dtype, 7).shape == (0, 7)
    assert len(tensor_bytes(torch.empty(0, 7, dtype=dtype))) == 0


def test_a_torn_row_is_refused() -> None:
    with pytest.raises(ProtocolError, match="27 bytes is not whole rows of 28"):
        tensor_from(memoryview(bytes(27)), torch.float32, 7)


def test_a_trace_is_one_part_more() -> None:
    assert traced_parts(frame(b"a", b"b"), 2)[1] is None
    parts, trace = traced_parts(frame(b"a", b"b", TRACEPARENT.encode()), 2)
    assert [bytes(part) for part in parts] == [b"a", b"b"]
    assert trace is not None
    assert get_current_span(trace).get_span_context().span_id == PARENT_ID


@pytest.mark.parametrize(
    "part", [b"", b"garbage", TRACEPARENT.encode()[:-1], TRACEPARENT.encode() + b" ", b"\xff" * 55]
)
def test_a_part_that_is_no_trace_is_refused(part: bytes) -> None:
    with pytest.raises(ProtocolError, match="frame of kind 6: its trace cannot be read"):
        traced_parts(frame(b"a", part), 1)


def test_a_trace_belongs_in_host_memory() -> None:
    came = Frame(Kind.DISPATCH, FrameTag(), (memoryview(b"a"), torch.zeros(55, dtype=torch.uint8)))
    with pytest.raises(ProtocolError, match="belongs in host memory"):
        traced_parts(came, 1)


@pytest.mark.parametrize("count", [1, 4])
def test_two_parts_more_or_one_less_are_no_trace(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"{count} parts, expected 2"):
        traced_parts(frame(*[TRACEPARENT.encode()] * count), 2)


def test_the_number_of_parts_is_checked() -> None:
    with pytest.raises(ProtocolError, match="2 parts, expected 3"):
        expect_parts(frame(b"a", b"b"), 3)


class Carrier:
    """As much of a wire as is looked at."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium


@pytest.mark.parametrize("medium", Medium)
def test_tensors_go_as_they_are_where_the_wire_carries_them(medium: Medium) -> None:
    rows = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    part = tensor_part(rows, Carrier(medium))  # type: ignore[arg-type]
    if medium is Medium.NCCL:
        assert part is rows
    else:
        assert isinstance(part, memoryview)
        assert len(part) == 12


@pytest.mark.parametrize("count", [0, 2])
def test_a_tensor_of_bytes_is_read_like_memory(count: int) -> None:
    rows = torch.arange(count * 3, dtype=torch.bfloat16).view(count, 3)
    came = rows.clone().view(-1).view(torch.uint8)
    back = tensor_from(came, torch.bfloat16, 3)
    assert torch.equal(back, rows)
    assert not count or back.data_ptr() == came.data_ptr()
    with pytest.raises(ProtocolError, match="a part of 7 bytes is not whole rows of 6 bytes"):
        tensor_from(torch.zeros(7, dtype=torch.uint8), torch.bfloat16, 3)
    with pytest.raises(ProtocolError, match="belongs in host memory"):
        indices_from(came)


def test_times_travel_as_they_are_and_anything_else_is_refused() -> None:
    times = BatchTimes(1 / 3, 2e-9)
    assert times_from(memoryview(encode_times(times))) == times
    assert seconds_from(memoryview(encode_seconds(1 / 3))) == 1 / 3
    for read, size in ((times_from, 8), (seconds_from, 16), (seconds_from, 0)):
        with pytest.raises(ProtocolError, match=f"a part of {size} bytes holds no times"):
            read(memoryview(bytes(size)))
    with pytest.raises(ProtocolError, match="it belongs in host memory"):
        times_from(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("medium", [Medium.SHM, Medium.NCCL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_make_a_part(dtype: torch.dtype, medium: Medium) -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    part = rows_part(rows, np.array([4, 0, 2]), Carrier(medium))  # type: ignore[arg-type]
    assert isinstance(part, Tensor) == (medium is Medium.NCCL)
    got = part if isinstance(part, Tensor) else tensor_from(memoryview(bytearray(part)), dtype, 7)
    assert torch.equal(got, rows[[4, 0, 2]])
