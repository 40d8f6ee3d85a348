"""What the HTTP API answers, and how it refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from expertmesh.v1 import inference_pb2 as pb
from starlette.types import Message

from cluster.access import EVERYBODY, AccessList
from cluster.gateway.errors import InvalidRequest, Overloaded, Unavailable
from cluster.gateway.http.api import api, metrics_api
from cluster.gateway.http.door import HttpDoor
from cluster.gateway.http.generation import Generation
from cluster.gateway.http.watched import Watched
from cluster.openai.paths import HEALTH, METRICS, MODELS, PATHS, Endpoint
from tests.unit.gateway.http.raw_http import (
    ADMIN,
    CLOSE,
    ENDLESS_BODY,
    FINISHED,
    MAX_BODY,
    STARTED,
    TEXT,
    TOKENS,
    USER,
    Model,
    connection,
    events,
    exchange,
    get,
    post,
    served,
    short,
)


async def test_a_request_reaches_the_model_with_what_belongs_to_it() -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with served(access=TOKENS) as (model, _, port):
        headers = (f"authorization: Bearer {USER}", f"traceparent: {trace}", "x-request-id: mine", CLOSE)
        reply = await exchange(port, post({"prompt": [1, 2]}, "/v1/completions", *headers))
    assert (reply.status, json.loads(reply.body)["choices"][0]["text"]) == (200, "lala")
    ((request, call),) = model.calls
    assert list(request.token_ids.ids) == [1, 2]
    assert request.request_id not in ("", "mine")
    assert reply.headers["x-request-id"] == "mine"
    assert (call.door, call.operation, call.caller.tenant) == ("http", "text_completion", "acme")
    assert call.trace == {"traceparent": trace}


async def test_an_unsafe_request_id_is_not_given_back() -> None:
    async with served() as (model, _, port):
        for sent in ("x-request-id: a b", f"x-request-id: {'a' * 200}", "accept: */*"):
            reply = await exchange(port, post(None, "/v1/completions", sent, CLOSE))
            assert reply.headers["x-request-id"] == model.calls[-1][0].request_id


async def test_a_stream_is_not_to_be_buffered() -> None:
    async with served() as (_, _, port):
        reply = await exchange(port, post({"prompt": "hi", "stream": True}, "/v1/completions", CLOSE))
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    *chunks, done = events(reply.body)
    assert done == "[DONE]"
    assert [json.loads(chunk)["choices"][0]["text"] for chunk in chunks] == ["la", "la", ""]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_status(stream: bool) -> None:
    async def full(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise Overloaded("QUEUE_FULL", 0.5)
        yield FINISHED

    async with served(full) as (_, _, port):
        reply = await exchange(port, post({"prompt": "hi", "stream": stream}, "/v1/completions", CLOSE))
    assert (reply.status, reply.error["code"]) == (429, "queue_full")
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("1", "500")


async def test_an_error_after_it_is_the_last_event() -> None:
    async def lost(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield STARTED
        yield TEXT
        raise Unavailable("SHARDS_DOWN", 1)

    async with served(lost) as (_, _, port):
        reply = await exchange(port, post({"prompt": "hi", "stream": True}, "/v1/completions", CLOSE))
    assert reply.status == 200
    chunk, last = map(json.loads, events(reply.body))
    assert chunk["choices"][0]["text"] == "la"
    assert last["error"]["code"] == "shards_down"


async def test_the_validators_complaints_use_the_clients_names() -> None:
    async def refuse(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise InvalidRequest("token_ids.ids[1]", "is token id 9; allowed is 0 to 8")
        yield FINISHED

    async with served(refuse) as (_, _, port):
        reply = await exchange(port, post({"prompt": [[1, 9]]}, "/v1/completions", CLOSE))
    assert (reply.status, reply.error["param"]) == (400, "prompt[0][1]")


async def test_a_fault_of_ours_is_opaque(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise KeyError("secret")
        yield FINISHED

    async with served(broken) as (_, _, port):
        reply = await exchange(port, post(None, "/v1/completions", CLOSE))
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert [record.message for record in caplog.records if "secret" in record.message]


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (get("/"), 404, "not_found"),
        (get("/v1/completions"), 405, "method_not_allowed"),
        (get("/v1/models/other"), 404, "model_not_found"),
        (post(path="/v1/completions/"), 404, "not_found"),
        (post(path="/v1/models"), 405, "method_not_allowed"),
        (post(data=b"{"), 400, "invalid_value"),
        (post(data=b"\xff\xfe"), 400, "invalid_value"),
        (post(data=b"[" * 100_000), 400, "invalid_value"),
        (post(data=b" " * (MAX_BODY + 1)), 413, "request_too_large"),
        (post().replace(b"application/json", b"text/plain"), 415, "unsupported_media_type"),
        (post().replace(b"content-type", b"x-nothing"), 415, "unsupported_media_type"),
        (post(None, "/v1/completions", "content-encoding: gzip"), 415, "unsupported_media_type"),
    ],
)
async def test_every_refusal_looks_alike(request_: bytes, status: int, code: str) -> None:
    if CLOSE.encode() not in request_:
        request_ = request_.replace(b"host: h", b"host: h\r\nconnection: close", 1)
    async with served() as (model, _, port):
        reply = await exchange(port, request_)
    assert (reply.status, reply.error["code"]) == (status, code)
    assert reply.error["type"] == "invalid_request_error"
    assert reply.headers["content-type"] == "application/json"
    assert not model.calls


async def test_a_content_type_may_name_its_charset() -> None:
    async with served() as (_, _, port):
        request = post(None, "/v1/completions", CLOSE).replace(b"/json", b"/JSON; charset=utf-8")
        assert (await exchange(port, request)).status == 200


async def test_tokens() -> None:
    async with served(access=TOKENS) as (model, _, port):
        assert (await exchange(port, get("/health"))).status == 200
        for sent in ((), ("authorization: Bearer nobody",), ("authorization: Basic x",)):
            for request in (get("/v1/models", *sent), get("/metrics", *sent), get("/nothing", *sent)):
                reply = await exchange(port, request)
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "bearer"
        user, admin = (f"authorization: Bearer {token}" for token in (USER, ADMIN))
        assert (await exchange(port, get("/v1/models", user))).status == 200
        assert (await exchange(port, get("/metrics", user))).status == 403
        reply = await exchange(port, get("/metrics", admin))
    assert (reply.status, reply.body) == (200, b"a_metric 1\n")
    assert reply.headers["content-type"].startswith("text/plain")
    assert not model.calls


async def test_models_with_a_slash_in_their_name() -> None:
    async with served() as (_, _, port):
        listed = json.loads((await exchange(port, get("/v1/models"))).body)
        one = json.loads((await exchange(port, get("/v1/models/org/tiny"))).body)
    assert listed["data"] == [one]
    assert (one["id"], one["max_model_len"], one["object"]) == ("org/tiny", 64, "model")


async def test_health_says_when_nothing_can_be_answered() -> None:
    async with served(ready=False) as (_, _, port):
        assert (await exchange(port, get("/health"))).status == 503


async def test_scrapes_wait_for_one_and_hold_up_no_request() -> None:
    """The loop's executor, in which requests are prepared, is not theirs."""
    begun, hold = threading.Semaphore(0), threading.Event()
    scrapes: list[int] = []

    def exposition() -> bytes:
        scrapes.append(1)
        begun.release()
        hold.wait()
        return f"m {len(scrapes)}\n".encode()

    async with served(exposition=exposition) as (_, door, port):
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        async with connection(port, get("/metrics")):
            while not begun.acquire(blocking=False):
                await asyncio.sleep(0)
            waiting = [asyncio.create_task(exchange(port, get("/metrics"))) for _ in range(8)]
        # the client that had it begun has left; the others wait on
        try:
            async with asyncio.timeout(30):
                while len(running(door)) < 9:
                    await asyncio.sleep(0)
                assert (await exchange(port, post(None, "/v1/completions", CLOSE))).status == 200
        finally:
            hold.set()
        replies = await asyncio.gather(*waiting)
        assert {reply.body for reply in replies} == {b"m 1\n"}
        assert (await exchange(port, get("/metrics"))).body == b"m 2\n"


def running(door: HttpDoor) -> set[asyncio.Task[None]]:
    assert door._server is not None
    return door._server.server_state.tasks


async def test_a_scrape_that_fails_is_a_fault_of_ours() -> None:
    def exposition() -> bytes:
        raise OSError("secret")

    async with served(exposition=exposition) as (_, _, port):
        for _ in range(2):
            reply = await exchange(port, get("/metrics"))
            assert (reply.status, reply.error["code"]) == (500, "internal_error")


async def test_a_path_with_a_line_break_is_another_one() -> None:
    async with served() as (_, _, port):
        for path in (HEALTH, METRICS, MODELS):
            assert (await exchange(port, get(path))).status == 200
            assert (await exchange(port, get(f"{path}%0a"))).status == 404


async def test_a_body_has_one_end() -> None:
    chunked = b'10\r\n{"prompt": "hi"}\r\n0\r\n\r\n'
    head = ENDLESS_BODY.replace(b"host: h", b"host: h\r\ncontent-length: 4")
    async with served() as (model, _, port):
        reply = await exchange(port, head + chunked + get("/v1/models"))
    assert (reply.status, reply.error["param"], reply.headers["connection"]) == (400, "transfer-encoding", "close")
    assert reply.body.count(b"HTTP/1.1") == 0
    assert not model.calls


async def test_a_default_is_told_from_the_clients_word() -> None:
    async with served() as (model, _, port):
        for body in ({"prompt": "hi"}, {"prompt": "hi", "max_tokens": 16}):
            await exchange(port, post(body, "/v1/completions", CLOSE))
    assert [call.default_max_tokens for _, call in model.calls] == [True, False]
    assert [request.stopping.max_tokens for request, _ in model.calls] == [16, 16]


async def test_the_close_does_not_come_between_head_and_body() -> None:
    sent: list[Message] = []
    closing = asyncio.Event()
    model: Any = Model(short)
    body = iter([{"type": "http.request", "body": b'{"prompt": "hi"}'}])

    async def receive() -> Message:
        for message in body:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)
        closing.set()
        for _ in range(10):
            await asyncio.sleep(0)

    state = {"request_id": "r1", "client_id": "", "caller": EVERYBODY}
    scope: Any = {"type": "http", "headers": [(b"content-type", b"application/json")], "state": state}
    await Generation(Endpoint.COMPLETIONS, model, MAX_BODY, closing)(scope, receive, send)
    assert [(message["type"], message.get("status")) for message in sent] == [
        ("http.response.start", 200),
        ("http.response.body", None),
    ]


def test_the_list_of_paths_is_complete() -> None:
    model: Any = Model(short)
    app: Any = api(model, AccessList(), Watched(bool, bytes), MAX_BODY, asyncio.Event())
    assert [route.path for route in app.routes if "{" not in route.path] == list(PATHS)


async def test_the_metrics_door_knows_nothing_else() -> None:
    door = HttpDoor(metrics_api(Watched(lambda: True, lambda: b"m 1\n")), "127.0.0.1", 0, None, asyncio.Event())
    port = int((await door.open()).rpartition(":")[2])
    assert (await exchange(port, get("/metrics"))).body == b"m 1\n"
    assert (await exchange(port, get("/health"))).status == 200
    assert (await exchange(port, get("/v1/models"))).status == 404
    await door.close()
