"""What travels on the wires: the kinds of frames and their parts. One pair of functions a kind.

==========  ======================  =========================================================================
kind        from → to               parts
==========  ======================  =========================================================================
ROWS        attention → router      rows [T, D] in the model's dtype
ROWS_DONE   router → attention      rows [T, D], weighted and combined
DISPATCH    router → expert shard   rows [R, D]; pair_row int32 [P]; pair_expert int32 [P]
RESULTS     expert shard → router   unweighted expert outputs [P, D], in the order of the pairs
FAILED      any reply direction     utf-8 message: the request with this tag could not be computed
TOKENS      attention → gateway     event records; the request ids joined by newlines; JSON {record: message}
==========  ======================  =========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engine.request import FinishReason, TokenEvent
from actors.transport.base import Buffer, Frame, ProtocolError


class Kind(IntEnum):
    """The ``kind`` of a frame."""

    ROWS = 1
    ROWS_DONE = 2
    DISPATCH = 3
    RESULTS = 4
    FAILED = 5
    TOKENS = 6


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype, without a copy."""
    return array_bytes(tensor.view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def array_bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array, without a copy."""
    return array.data.cast("B")


def tensor_from(part: memoryview, dtype: torch.dtype, columns: int) -> Tensor:
    """[n, columns] view of a received part; it dies with the part. ProtocolError if the size does not divide."""
    row_bytes = columns * dtype.itemsize
    if len(part) % row_bytes:
        raise ProtocolError(f"a part of {len(part)} bytes is not whole rows of {row_bytes} bytes")
    if len(part) == 0:
        return torch.empty((0, columns), dtype=dtype)
    return torch.frombuffer(part, dtype=dtype).view(-1, columns)


def expect_parts(frame: Frame, count: int) -> tuple[memoryview, ...]:
    """The frame's parts; ProtocolError unless there are exactly ``count``."""
    if len(frame.parts) != count:
        raise ProtocolError(f"frame of kind {frame.kind} has {len(frame.parts)} parts, expected {count}")
    return frame.parts


def failure_text(frame: Frame) -> str:
    """The message of a FAILED frame."""
    (text,) = expect_parts(frame, 1)
    return bytes(text).decode()


_EVENT = np.dtype([("index", "<u4"), ("token", "<i4"), ("finish", "u1")])
_FINISH: tuple[FinishReason | None, ...] = (None, *FinishReason)


def encode_tokens(events: Sequence[TokenEvent]) -> list[Buffer]:
    """Parts of a TOKENS frame."""
    records = np.empty(len(events), dtype=_EVENT)
    for at, event in enumerate(events):
        token = -1 if event.token is None else event.token
        records[at] = (event.index, token, _FINISH.index(event.finish))
    messages = {str(at): event.message for at, event in enumerate(events) if event.message}
    return [
        records.tobytes(),
        "\n".join(event.request_id for event in events).encode(),
        json.dumps(messages).encode() if messages else b"",
    ]


def decode_tokens(frame: Frame) -> list[TokenEvent]:
    """The events of a TOKENS frame, as they were given to ``encode_tokens``."""
    records, ids, messages = expect_parts(frame, 3)
    told: dict[str, Any] = json.loads(bytes(messages)) if len(messages) else {}
    rows = np.frombuffer(records, dtype=_EVENT)
    names = bytes(ids).decode().split("\n") if len(rows) else []
    return [
        TokenEvent(
            request_id=name,
            index=int(row["index"]),
            token=None if row["token"] < 0 else int(row["token"]),
            finish=_FINISH[row["finish"]],
            message=told.get(str(at), ""),
        )
        for at, (name, row) in enumerate(zip(names, rows, strict=True))
    ]
