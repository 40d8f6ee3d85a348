"""The channels of the command line take whatever a gateway sends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.cli.client import open_aio_channel, open_channel
from cluster.cli.connection import Connection

LARGE = bytes(5 * 2**20)
"""gRPC's clients take 4 MiB unless they are told otherwise."""
PATH = "/a.Service/Method"


class Large(grpc.GenericRpcHandler):
    """Answers every call with it."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: LARGE)


@pytest.fixture
def target() -> Iterator[str]:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, [Large()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.mark.parametrize("token", ["", "secret"])
async def test_messages_of_any_size(target: str, token: str) -> None:
    connection = Connection(target, None, token)
    with open_channel(connection) as channel:
        assert channel.unary_unary(PATH)(b"", timeout=60) == LARGE
    async with open_aio_channel(connection) as channel:
        assert await channel.unary_unary(PATH)(b"", timeout=60) == LARGE
