"""What the commands that talk to a gateway share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.cli.connection import TOKEN_VARIABLE, ClientTls, Connection

_ANY_SIZE = ("grpc.max_receive_message_length", -1)
"""What the gateway sends is bounded by its own configuration; gRPC's 4 MiB may be less."""


def open_channel(connection: Connection) -> grpc.Channel:
    """A channel whose calls carry the connection's token. Close it, or use it as a context manager."""
    options = _options(connection)
    if connection.tls is None:
        channel = grpc.insecure_channel(connection.target, options)
    else:
        channel = grpc.secure_channel(connection.target, _credentials(connection.tls), options)
    return grpc.intercept_channel(channel, _Bearer(connection.token)) if connection.token else channel


def open_aio_channel(connection: Connection, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """The same for many calls in an event loop, but for the token: these calls have to carry it themselves."""
    options = [*options, *_options(connection)]
    if connection.tls is None:
        return grpc.aio.insecure_channel(connection.target, options)
    return grpc.aio.secure_channel(connection.target, _credentials(connection.tls), options)


def explain(error: grpc.RpcError, connection: Connection) -> str:
    """One line for people: the code, what the server said, and the fields it named."""
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.UNAVAILABLE and rpc_status.from_call(error) is None:
        return _no_answer(connection, details)
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return f"{code.name}: {details} (--token-file FILE, or ${TOKEN_VARIABLE})"
    retry = _retry_delay(error)
    again = f"; retry in {retry:g} s" if retry is not None and "retry" not in details else ""
    return f"{code.name}: {details}{again}"


def _no_answer(connection: Connection, details: str) -> str:
    """gRPC has one code for all of these and tells the cause in words alone."""
    target, tls = connection.target, connection.tls
    if "Hostname Verification" in details:
        return f"the certificate of the gateway at {target} is for other names"
    if "handshake failed" in details:
        cause = details.rpartition("OPENSSL_internal:")[2].removesuffix(": OK")
        return f"no TLS connection to {target}: {cause} (is --ca the authority of its certificate?)"
    if "Socket closed" in details and tls is None:
        return f"the server at {target} closed the connection; it has ended, or it speaks TLS (--ca FILE or --tls)"
    if "Socket closed" in details and tls is not None and tls.certificate is None:
        return f"the server at {target} closed the TLS connection; does it want a certificate (--cert, --key)?"
    return f"no gateway answers at {target} (is `expertmesh serve` running? --target HOST:PORT chooses another)"


def _options(connection: Connection) -> list[tuple[str, int]]:
    # a token in plaintext is for this machine alone, and not for the proxy that http_proxy names
    here = connection.token and connection.tls is None
    return [_ANY_SIZE, ("grpc.enable_http_proxy", 0)] if here else [_ANY_SIZE]


def _credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)


def _retry_delay(error: grpc.RpcError) -> float | None:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return None


@dataclass(frozen=True)
class _CallDetails(grpc.ClientCallDetails):
    """One call, as gRPC hands it through interceptors."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the token to each call: gRPC's own call credentials refuse plaintext, on loopback too."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: grpc.ClientCallDetails, one: Any) -> Any:
        """See grpc."""
        return continuation(self._with_token(details), one)

    def intercept_unary_stream(
        self, continuation: Callable[..., Any], details: grpc.ClientCallDetails, one: Any
    ) -> Any:
        """See grpc."""
        return continuation(self._with_token(details), one)

    def _with_token(self, call: grpc.ClientCallDetails) -> _CallDetails:
        metadata = (*(call.metadata or ()), self._entry)
        return _CallDetails(
            call.method, call.timeout, metadata, call.credentials, call.wait_for_ready, call.compression
        )
