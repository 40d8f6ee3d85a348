"""Every gRPC call passes here first: whose it is, and whether they may."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

import grpc
from expertmesh.v1 import control_pb2
from grpc_health.v1 import health

from cluster.access import EVERYBODY, AccessList, Caller, bearer_token
from cluster.gateway.errors import PermissionDenied, ServiceError, Unauthenticated
from cluster.gateway.status import abort

_CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
_HEALTH_METHODS = f"/{health.SERVICE_NAME}/"
_CONTROL_METHODS = f"/{_CONTROL}/"
_HEADER = "authorization"

_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Whose call is being handled. Raises LookupError outside of a call, and in the health service's."""
    return _caller.get()


def authenticate(access: AccessList, headers: Sequence[str]) -> Caller:
    """The caller behind the call's ``authorization`` headers, of which there must be one. Raises Unauthenticated."""
    if access.is_open:
        return EVERYBODY
    if not headers:
        raise Unauthenticated("TOKEN_MISSING", "a token is needed: authorization: Bearer TOKEN")
    token = bearer_token(headers[0]) if len(headers) == 1 else None
    if token is None:
        raise Unauthenticated("TOKEN_MALFORMED", "send exactly one header `authorization: Bearer TOKEN`")
    found = access.caller(token)
    if found is None:
        raise Unauthenticated("TOKEN_UNKNOWN", "the token is not known here")
    return found


def authorise(who: Caller) -> None:
    """For what looks at the cluster or changes it. Raises PermissionDenied."""
    if not who.is_admin:
        raise PermissionDenied(
            "ADMIN_NEEDED", f"role admin is needed; the token of tenant {who.tenant!r} has {who.role}"
        )


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Lets through calls with a known token, to Control only those of admins, and health probes without any.

    A handler runs in the context of its interceptors: there it finds ``caller()``.
    """

    def __init__(self, access: AccessList) -> None:
        self._access = access

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's handler, or one that refuses the call before its request is read."""
        method = handler_call_details.method
        if not method.startswith(_HEALTH_METHODS):
            headers = [value for key, value in handler_call_details.invocation_metadata if key == _HEADER]
            try:
                who = authenticate(self._access, headers)
                if method.startswith(_CONTROL_METHODS):
                    authorise(who)
            except ServiceError as error:
                return _refusal(error)
            _caller.set(who)
        return await continuation(handler_call_details)


def _refusal(error: ServiceError) -> grpc.RpcMethodHandler:
    async def refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    # fits calls of every kind: this one does not wait for a request, which may be long or never come
    return grpc.stream_stream_rpc_method_handler(refuse)
