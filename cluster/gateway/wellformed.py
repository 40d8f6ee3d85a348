"""Requests that are no protobuf message, or not UTF-8 inside: the client's fault, which gRPC itself calls UNKNOWN."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.gateway.errors import InvalidRequest
from cluster.gateway.status import abort

_Parse = Callable[[bytes], Any]


class WellFormed(grpc.aio.ServerInterceptor):
    """Lets a method see only messages that can be read; the others end with INVALID_ARGUMENT. For methods with one
    request; none of ours takes a stream of them."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's handler around which its message is read."""
        handler = await continuation(handler_call_details)
        parse = getattr(handler, "request_deserializer", None)
        if parse is None or handler.request_streaming:
            return handler
        serializer = handler.response_serializer
        if not handler.response_streaming:
            method = _awaited(handler.unary_unary, parse)
            return grpc.unary_unary_rpc_method_handler(method, response_serializer=serializer)
        # a stream is answered by a generator, or by a coroutine that writes, as Watch of the health service
        streaming: Any = _generated if inspect.isasyncgenfunction(handler.unary_stream) else _awaited
        method = streaming(handler.unary_stream, parse)
        return grpc.unary_stream_rpc_method_handler(method, response_serializer=serializer)


def _awaited(method: Callable[..., Awaitable[Any]], parse: _Parse) -> Callable[..., Awaitable[Any]]:
    async def handle(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        return await method(await _read(data, parse, context), context)

    return handle


def _generated(method: Callable[..., AsyncGenerator[Any]], parse: _Parse) -> Callable[..., AsyncIterator[Any]]:
    async def handle(data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async with aclosing(method(await _read(data, parse, context), context)) as messages:
            async for message in messages:
                yield message

    return handle


async def _read(data: bytes, parse: _Parse, context: grpc.aio.ServicerContext) -> Any:
    try:
        return parse(data)
    except DecodeError:
        await abort(
            context, InvalidRequest("request", "cannot be read; allowed is a protobuf message, its texts UTF-8")
        )
