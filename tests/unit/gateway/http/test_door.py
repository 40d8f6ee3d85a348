"""The HTTP door and its connections: clients that leave, stall, send nonsense or never finish; and its close."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator

import pytest
from expertmesh.v1 import inference_pb2 as pb

from cluster.gateway.http import edge, protocol
from cluster.gateway.http.door import HttpDoor
from cluster.gateway.http.protocol import HttpProtocol
from tests.unit.gateway.http.raw_http import (
    CLOSE,
    ENDLESS_BODY,
    FINISHED,
    MAX_BODY,
    STARTED,
    TOKENS,
    Reply,
    Script,
    connection,
    endless,
    exchange,
    get,
    post,
    served,
    stuck,
    stuck_after_one,
)


@pytest.mark.parametrize(("script", "stream"), [(stuck, False), (stuck, True), (stuck_after_one, True)])
async def test_a_client_that_goes_away_frees_its_request(script: Script, stream: bool) -> None:
    async with served(script) as (model, _, port):
        async with connection(port, post({"prompt": "hi", "stream": stream})) as (reader, _):
            if script is stuck_after_one:
                await reader.readuntil(b"la")
            while not model.calls:
                await asyncio.sleep(0)
            assert not model.freed.is_set()
        await model.freed.wait()


@pytest.mark.parametrize("more", [b"G", b"\r\nGET /health HTTP/1.1\r\nhost: h\r\n\r\n", post()])
@pytest.mark.parametrize("stream", [False, True])
async def test_also_if_it_had_sent_more_than_its_request(more: bytes, stream: bool) -> None:
    script = stuck_after_one if stream else stuck
    async with served(script) as (model, door, port):
        async with connection(port, post({"prompt": "hi", "stream": stream})) as (_, writer):
            while not model.calls:
                await asyncio.sleep(0)
            writer.write(more)
            while not only(door).conn.trailing_data[0]:
                await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await model.freed.wait()


async def test_requests_that_come_early_are_answered_in_turn() -> None:
    async with served() as (model, _, port):
        reply = await exchange(port, post() + post() + post(None, "/v1/completions", CLOSE))
    assert reply.status == 200
    assert reply.body.count(b"lala") == 3
    assert len(model.calls) == 3


async def test_what_comes_early_is_not_kept_without_limit() -> None:
    async with served(stuck) as (model, _, port), connection(port, post()) as (_, writer):
        while not model.calls:
            await asyncio.sleep(0)
        writer.write(b"G" * (4 * protocol.EARLY_BYTES))
        async with asyncio.timeout(10):
            await model.freed.wait()


def only(door: HttpDoor) -> HttpProtocol:
    """The connection that there is."""
    assert door._server is not None
    (held,) = door._server.server_state.connections
    assert isinstance(held, HttpProtocol)
    return held


async def test_a_reader_that_stops_reading_stops_the_stream() -> None:
    async with served(endless) as (model, door, port):
        async with connection(port, post({"prompt": "hi", "stream": True})) as (reader, writer):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await reader.readuntil(b"x")
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            held = only(door)
            while not held.flow.write_paused:
                await asyncio.sleep(0)
            sent = model.sent
            for _ in range(1000):
                await asyncio.sleep(0)
            assert model.sent <= sent + 1
            assert held.transport.get_write_buffer_size() < 2**20
        await model.freed.wait()


async def long(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield STARTED
    yield pb.GenerateResponse(request_id="r1", text="x" * 2**23)
    yield FINISHED


@pytest.mark.parametrize(("script", "stream"), [(endless, True), (long, False)])
async def test_a_reader_that_stops_reading_is_cut_off(
    script: Script, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "STALL_TIMEOUT_S", 0.05)
    async with served(script) as (model, door, port):
        request = post({"prompt": "hi", "stream": stream}, "/v1/completions", CLOSE)
        async with connection(port, request) as (reader, writer):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await reader.readuntil(b"x")
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            held = only(door)
            async with asyncio.timeout(10):
                await model.freed.wait()
                while door._server is not None and held in door._server.server_state.connections:
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("last", [CLOSE, "accept: */*"])
async def test_the_rest_of_an_answer_does_not_wait_for_ever(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is so little that writing never had to pause."""
    ready = asyncio.Event()

    async def later(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await ready.wait()
        async for message in long(request):
            yield message

    monkeypatch.setattr(protocol, "STALL_TIMEOUT_S", 0.05)
    async with (
        served(later) as (model, door, port),
        connection(port, post(None, "/v1/completions", last)) as (reader, writer),
    ):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while not model.calls:
            await asyncio.sleep(0)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        only(door).transport.set_write_buffer_limits(high=2**30)
        ready.set()
        assert door._server is not None
        async with asyncio.timeout(3):
            while door._server.server_state.connections:
                await asyncio.sleep(0.01)


async def test_amid_the_next_answer_what_waits_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = post({"prompt": "hi", "stream": True})
    async with served(stuck_after_one) as (_, door, port), connection(port, stream) as (reader, _):
        await reader.readuntil(b"la")
        held = only(door)
        monkeypatch.setattr(held.transport, "get_write_buffer_size", lambda: 10)
        held._look_at_reader(5)
        assert not held.transport.is_closing()
        held.flow.pause_writing()
        held._look_at_reader(5)
        assert held.transport.is_closing()


async def test_a_reader_that_reads_slowly_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STALL_TIMEOUT_S", 0.2)
    async with (
        served(long) as (_, _, port),
        connection(port, post(None, "/v1/completions", CLOSE)) as (reader, _),
    ):
        data = b""
        while part := await reader.read(2**18):
            data += part
            await asyncio.sleep(0.02)
    assert Reply(data).body.count(b"x") >= 2**23


async def test_who_reads_may_wait_long_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield STARTED
        yield pb.GenerateResponse(request_id="r1", text="x" * 2**20)
        await asyncio.sleep(5 * protocol.STALL_TIMEOUT_S)
        yield FINISHED

    monkeypatch.setattr(protocol, "STALL_TIMEOUT_S", 0.05)
    async with served(slow) as (_, _, port):
        reply = await exchange(port, post({"prompt": "hi", "stream": True}, "/v1/completions", CLOSE))
    assert b"[DONE]" in reply.body


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not stop sending is not listened to for long."""
    monkeypatch.setattr(edge, "LINGER_S", 0.05)


@pytest.mark.usefixtures("impatient")
async def test_a_body_without_end_is_cut_at_the_limit() -> None:
    async with served() as (_, _, port), connection(port, ENDLESS_BODY) as (reader, writer):
        for _ in range(MAX_BODY // 4096 + 1):
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
        reply = Reply(await reader.read())
    assert (reply.status, reply.headers["connection"]) == (413, "close")


@pytest.mark.usefixtures("impatient")
async def test_a_length_beyond_the_limit_is_refused_unseen() -> None:
    head = ENDLESS_BODY.replace(b"transfer-encoding: chunked", b"content-length: 1000000")
    async with served() as (_, _, port), connection(port, head) as (reader, _):
        assert Reply(await reader.read()).status == 413


async def test_the_limit_is_what_the_models_context_can_hold() -> None:
    async with served(max_message=2**30) as (_, _, port):
        for extra, status in ((0, 200), (1, 413)):
            body = b'{"prompt": "hi"' + b" " * (2**20 + 64 * 64 - 16 + extra) + b"}"
            assert (await exchange(port, post(None, "/v1/completions", CLOSE, data=body))).status == status


@pytest.mark.usefixtures("impatient")
async def test_a_body_that_comes_drop_by_drop_runs_out_of_time() -> None:
    async with (
        served(body_timeout_s=0.05) as (_, _, port),
        connection(port, ENDLESS_BODY + b"1\r\n{\r\n") as (reader, _),
    ):
        reply = Reply(await reader.read())
    assert (reply.status, reply.error["code"], reply.headers["connection"]) == (408, "request_timeout", "close")


@pytest.mark.usefixtures("impatient")
async def test_who_is_refused_before_the_body_is_read_need_not_send_it() -> None:
    async with served(access=TOKENS) as (_, _, port), connection(port, ENDLESS_BODY) as (reader, _):
        reply = Reply(await reader.read())
    assert (reply.status, reply.headers["connection"]) == (401, "close")


async def test_a_client_that_goes_away_in_its_body_leaves_nothing() -> None:
    async with served() as (model, _, port):
        async with connection(port, ENDLESS_BODY + b"1\r\n{\r\n"):
            pass
        assert not model.calls


async def test_a_head_without_end_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.05)
    async with served() as (_, _, port):
        for data in (b"", b"GET /health HT"):
            async with connection(port, data) as (reader, _):
                assert await asyncio.gather(reader.read(), return_exceptions=True)
        whole = get("/health").replace(CLOSE.encode(), b"accept: */*")
        async with connection(port, whole) as (reader, writer):
            assert b"200 OK" in await reader.readuntil(b"}")
            writer.write(b"GET /health HT")
            await asyncio.gather(reader.read(), return_exceptions=True)


async def test_only_the_head_has_to_be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield STARTED
        await asyncio.sleep(5 * protocol.HEAD_TIMEOUT_S)
        yield FINISHED

    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.05)
    async with served(slow) as (_, _, port):
        assert (await exchange(port, post(None, "/v1/completions", CLOSE))).status == 200


GARBAGE = [
    b"\x00\xff\x16\x03\x01" * 100,
    b"G\x00T / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\nx-long: " + b"a" * 2**20,
    b"\r\n" * 99_999,
]


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_ends_its_own_connection_only(garbage: bytes) -> None:
    async with served() as (_, _, port):
        async with connection(port, garbage) as (reader, _):
            (told,) = await asyncio.gather(reader.read(), return_exceptions=True)
            assert isinstance(told, ConnectionError) or Reply(told).status == 400
        assert (await exchange(port, get("/health"))).status == 200


async def test_a_head_that_is_no_http_is_told_as_every_error() -> None:
    async with served() as (_, _, port):
        reply = await exchange(port, GARBAGE[1])
    assert (reply.status, reply.error["code"], reply.headers["connection"]) == (400, "invalid_http", "close")


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_body_that_breaks_off_does_no_harm(at_once: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It comes amid the refusal, or before it."""
    broken = b"zzzz\r\n\r\n"
    async with served(access=TOKENS) as (_, _, port):
        async with connection(port, ENDLESS_BODY + broken * at_once) as (reader, writer):
            if not at_once:
                assert b"401" in await reader.readuntil(b"\r\n\r\n")
                writer.write(broken)
            (told,) = await asyncio.gather(reader.read(), return_exceptions=True)
        assert not at_once or (isinstance(told, bytes) and Reply(told).status == 400)
        assert (await exchange(port, get("/health"))).status == 200
    assert {record.message for record in caplog.records} == {"Invalid HTTP request received."}


async def test_a_body_that_breaks_off_frees_its_request() -> None:
    async with served() as (model, _, port):
        reply = await exchange(port, ENDLESS_BODY + b"zzzz\r\n\r\n")
    assert reply.status == 400
    assert not model.calls


async def test_a_door_has_room_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 2)
    async with served() as (_, _, port):
        kept = get("/health").replace(CLOSE.encode(), b"accept: */*")
        async with connection(port, kept) as (first, _), connection(port, kept) as (second, _):
            for reader in (first, second):
                assert b"ok" in await reader.readuntil(b"}")
            async with connection(port, b"") as (reader, _):
                reply = Reply(await reader.read())
            assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
            assert (reply.headers["connection"], reply.headers["retry-after"]) == ("close", "1")
        await until_room(port)


async def until_room(port: int) -> None:
    async with asyncio.timeout(10):
        while (await exchange(port, get("/health"))).status != 200:
            await asyncio.sleep(0)


@pytest.mark.parametrize(("files", "most"), [(1024, 256), (2**20, 4096), (resource.RLIM_INFINITY, 4096)])
def test_that_room_is_within_what_the_process_may_open(files: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert protocol._most_connections() == most


# -- closing ----------------------------------------------------------------------------------------------------------


async def test_a_kept_connection_does_not_delay_the_close() -> None:
    async with served() as (_, door, port), connection(port, post()) as (reader, _):
        await reader.readuntil(b"lala")
        await asyncio.wait_for(door.close(), 0.9)
        await asyncio.wait_for(door.close(), 0.9)


async def test_what_still_runs_is_told_that_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    stream = post({"prompt": "hi", "stream": True})
    async with (
        served(stuck_after_one) as (model, door, port),
        connection(port, stream) as (streaming, _),
        connection(port, post()) as (waiting, _),
    ):
        await streaming.readuntil(b"la")
        while len(model.calls) < 2:
            await asyncio.sleep(0)
        await door.close()
        rest, reply = await streaming.read(), Reply(await waiting.read())
    assert b'"code":"draining"' in rest
    assert b"[DONE]" not in rest
    assert (reply.status, reply.error["code"], reply.headers["connection"]) == (503, "draining", "close")
    assert not caplog.records


async def test_the_close_waits_for_no_stalled_reader_and_no_half_request(caplog: pytest.LogCaptureFixture) -> None:
    async with served(endless) as (model, door, port):
        async with connection(port, post({"prompt": "hi", "stream": True})) as (reader, _):
            await reader.readuntil(b"x")
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            async with connection(port, ENDLESS_BODY), connection(port, b"GET /"):
                await asyncio.wait_for(door.close(), 5)
        assert model.freed.is_set()
    assert not caplog.records
