"""What the commands that talk to a gateway share."""

from __future__ import annotations

import sys

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


def explain(error: grpc.RpcError, target: str) -> str:
    """One line for people: the code, what the server said, and the fields it named."""
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.UNAVAILABLE and rpc_status.from_call(error) is None:
        return f"no gateway answers at {target} (is `expertmesh serve` running? --target HOST:PORT chooses another)"
    retry = _retry_delay(error)
    again = f"; retry in {retry:g} s" if retry is not None and "retry" not in details else ""
    return f"{code.name}: {details}{again}"


def complain(text: str) -> int:
    """Print an error to stderr; the exit status that goes with it."""
    print(f"error: {text}", file=sys.stderr)
    return 1


def _retry_delay(error: grpc.RpcError) -> float | None:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return None
