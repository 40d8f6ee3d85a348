"""An HTTP door over an answer that each test writes itself, and a client that sends what it likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from expertmesh.v1 import inference_pb2 as pb

from cluster.access import AccessList, token_hash
from cluster.config import TokenConfig
from cluster.gateway.call import Call
from cluster.gateway.http.api import api
from cluster.gateway.http.door import HttpDoor
from cluster.gateway.http.watched import Watched

STARTED = pb.GenerateResponse(request_id="r1", started=pb.Started(model="tiny", prompt_tokens=3))
TEXT = pb.GenerateResponse(request_id="r1", text="la")
FINISHED = pb.GenerateResponse(request_id="r1", finished=pb.Finished(reason=pb.FINISH_REASON_STOP))
MAX_BODY = 200_000
USER, ADMIN = "emt_user", "emt_admin"
TOKENS = AccessList(
    [
        TokenConfig(sha256=token_hash(USER), tenant="acme"),
        TokenConfig(sha256=token_hash(ADMIN), tenant="ops", role="admin"),
    ]
)

Script = Callable[[pb.GenerateRequest], AsyncIterator[pb.GenerateResponse]]


class Model:
    """Answers as ``script`` says, and remembers what came and what ended."""

    def __init__(self, script: Script) -> None:
        self.model = SimpleNamespace(name="org/tiny", context_length=64)
        self.calls: list[tuple[pb.GenerateRequest, Call]] = []
        self.freed = asyncio.Event()
        self.sent = 0
        self._script = script

    async def generate(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse]:
        self.calls.append((request, call))
        try:
            async for message in self._script(request):
                self.sent += 1
                yield message
        finally:
            self.freed.set()


async def short(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    for message in (STARTED, TEXT, TEXT, FINISHED):
        yield message


async def stuck(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    await asyncio.Event().wait()
    yield FINISHED


async def stuck_after_one(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield STARTED
    yield TEXT
    await asyncio.Event().wait()


async def endless(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield STARTED
    while True:
        yield pb.GenerateResponse(request_id="r1", text="x" * 10_000)
        await asyncio.sleep(0)


@asynccontextmanager
async def served(
    script: Script = short,
    access: AccessList | None = None,
    body_timeout_s: float = 30,
    ready: bool = True,
    max_message: int = MAX_BODY,
    exposition: Callable[[], bytes] = lambda: b"a_metric 1\n",
) -> AsyncIterator[tuple[Model, HttpDoor, int]]:
    model: Any = Model(script)
    closing = asyncio.Event()
    watched = Watched(lambda: ready, exposition)
    app = api(model, access or AccessList(), watched, max_message, closing, body_timeout_s)
    door = HttpDoor(app, "127.0.0.1", 0, None, closing)
    address = await door.open()
    try:
        yield model, door, int(address.rpartition(":")[2])
    finally:
        await door.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


class Reply:
    """A whole response, as its bytes tell it."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        self.status = int(status.split()[1])
        self.headers = dict(line.lower().split(": ", 1) for line in lines)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


def post(body: Any = None, path: str = "/v1/completions", *headers: str, data: bytes | None = None) -> bytes:
    data = json.dumps({"prompt": "hi"} if body is None else body).encode() if data is None else data
    lines = [f"POST {path} HTTP/1.1", "host: h", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: h", *headers, "connection: close", "", ""]).encode()


CLOSE = "connection: close"


async def exchange(port: int, data: bytes) -> Reply:
    """Send, and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return Reply(await reader.read())
    finally:
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def connection(port: int, data: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def events(body: bytes) -> list[str]:
    """The data of each event of a chunked stream."""
    text = b"".join(body.split(b"\r\n")[1::2]).decode()
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


ENDLESS_BODY = (
    b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
)
