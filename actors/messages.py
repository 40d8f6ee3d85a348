"""What travels on the wires: the kinds of frames and their parts. One pair of functions a kind.

==========  ======================  =========================================================================
kind        from → to               parts
==========  ======================  =========================================================================
ROWS        attention → router      rows [T, D] in the model's dtype; trace*
ROWS_DONE   router → attention      rows [T, D], weighted and combined; BatchTimes, two float64
DISPATCH    router → expert shard   rows [R, D]; pair_row int32 [P]; pair_expert int32 [P]; trace*
RESULTS     expert shard → router   unweighted expert outputs [P, D], in the order of the pairs; seconds of computing
                                    them, float64
FAILED      any reply direction     utf-8 message: the request with this tag could not be computed
TOKENS      attention → gateway     see ``token_frames.py``
==========  ======================  =========================================================================

trace*: the traceparent of the sender's span, always in host memory. Only in the few frames that are traced.
The ``micro_batch`` of a tag counts down within a layer: 0 is the step's last, and the only one of a whole step.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.frames import array_bytes, expect_parts, on_host
from actors.trace_context import Trace, trace_from
from actors.transport.base import Buffer, Frame, Medium, Part, ProtocolError, Wire


def tensor_part(tensor: Tensor, wire: Wire) -> Buffer | Tensor:
    """A contiguous tensor as a part of a frame for ``wire``: itself where the wire carries tensors, else its bytes."""
    return tensor if wire.medium is Medium.NCCL else tensor_bytes(tensor)


def rows_part(rows: Tensor, at: NDArray[np.int64], wire: Wire) -> Buffer | Tensor:
    """``rows[at]`` as a part of a frame for ``wire``: contiguous rows [N, D], ``at`` int64[P].

    In host memory by numpy, in half of torch's time for a dozen rows.
    """
    if rows.is_cpu and wire.medium is not Medium.NCCL:
        return array_bytes(rows.view(torch.uint8).numpy().take(at, 0))
    return tensor_part(rows.index_select(0, torch.from_numpy(at).to(rows.device)), wire)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype: without a copy on the CPU, else copied to the host."""
    if not tensor.numel():
        return memoryview(b"")
    return array_bytes((tensor if tensor.is_cpu else tensor.cpu()).view(torch.uint8).numpy())


CPU = torch.device("cpu")


def tensor_from(part: Part, dtype: torch.dtype, columns: int, device: torch.device = CPU) -> Tensor:
    """[n, columns] of a received part on ``device``. A view that dies with the part, or a copy if that lies elsewhere.

    ProtocolError if the size does not divide.
    """
    row_bytes = columns * dtype.itemsize
    if len(part) % row_bytes:
        raise ProtocolError(f"a part of {len(part)} bytes is not whole rows of {row_bytes} bytes")
    if len(part) == 0:
        return torch.empty((0, columns), dtype=dtype, device=device)
    flat = part.view(dtype) if isinstance(part, Tensor) else torch.frombuffer(part, dtype=dtype)
    rows = flat.view(-1, columns)
    return rows if rows.device == device else rows.to(device)  # a .to that does nothing takes time too


def indices_from(part: Part, device: torch.device = CPU) -> Tensor:
    """int64[P] on ``device`` of a received int32 part. ProtocolError if it is not in host memory."""
    return torch.from_numpy(np.frombuffer(on_host(part), np.int32).astype(np.int64)).to(device)


def traced_parts(frame: Frame, count: int) -> tuple[tuple[Part, ...], Trace | None]:
    """The frame's ``count`` parts, and the trace that it belongs to if it has one part more.

    ProtocolError if that is no trace: an actor of ours wrote it, so the rest of the frame is not to be trusted either.
    """
    if len(frame.parts) != count + 1:
        return expect_parts(frame, count), None
    try:
        return frame.parts[:count], trace_from(bytes(on_host(frame.parts[count])).decode())
    except ValueError as error:
        raise ProtocolError(f"frame of kind {frame.kind}: its trace cannot be read: {error}") from error


class BatchTimes(NamedTuple):
    """Seconds of one batch: the longest that any expert shard computed, and from the router's sending it out to its
    answer. On a GPU a shard tells those of its last batch that the device has ended."""

    experts_s: float
    router_s: float


_TIMES = struct.Struct("<2d")
_SECONDS = struct.Struct("<d")


def encode_seconds(seconds: float) -> bytes:
    """The last part of a RESULTS frame."""
    return _SECONDS.pack(seconds)


def seconds_from(part: Part) -> float:
    """What ``encode_seconds`` was given. ProtocolError if it is none."""
    return float(_unpack(_SECONDS, part)[0])


def encode_times(times: BatchTimes) -> bytes:
    """The last part of a ROWS_DONE frame."""
    return _TIMES.pack(*times)


def times_from(part: Part) -> BatchTimes:
    """What ``encode_times`` was given. ProtocolError if it is none."""
    return BatchTimes(*_unpack(_TIMES, part))


def _unpack(form: struct.Struct, part: Part) -> tuple[Any, ...]:
    try:
        return form.unpack(on_host(part))
    except struct.error as error:
        raise ProtocolError(f"a part of {len(part)} bytes holds no times: {error}") from error


def failure_text(frame: Frame) -> str:
    """The message of a FAILED frame."""
    (text,) = expect_parts(frame, 1)
    return bytes(on_host(text)).decode()
