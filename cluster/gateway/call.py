"""What a door knows of a request, before anybody looks into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from expertmesh.v1 import inference_pb2 as pb

from cluster.access import Caller

TRACE_HEADERS = ("traceparent",)
"""W3C Trace Context, as gRPC metadata or HTTP headers."""


Operation = Literal["chat", "text_completion"]
"""As OpenTelemetry's conventions for generative AI name them."""


@dataclass(frozen=True)
class Call:
    """What a door knows of a request beside its message.

    ``timeout_s``: what is left of the client's deadline, None without one.
    ``trace``: those of TRACE_HEADERS that the client sent.
    ``default_max_tokens``: the message's ``max_tokens`` is the door's, and not the client's: see ``validate``.
    ``client_id``: a name that the client gave the request beside its own, for logs alone; printable ASCII.
    """

    door: Literal["grpc", "http"]
    operation: Operation
    caller: Caller
    timeout_s: float | None = None
    trace: Mapping[str, str] = field(default_factory=dict)
    default_max_tokens: bool = False
    client_id: str = ""


def operation_of(request: pb.GenerateRequest) -> Operation:
    """What a request asks for."""
    return "chat" if request.HasField("messages") else "text_completion"
