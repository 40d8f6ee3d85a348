"""The HTTP door and its connections: clients that leave, stall, send nonsense or never finish; and its close."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from expertmesh.v1 import inference_pb2 as pb

from cluster.gateway.http import edge, protocol
from cluster.gateway.http.api import Watched, metrics_api
from cluster.gateway.http.door import HttpDoor
from cluster.gateway.settings import PortInUse
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


async def test_a_reader_that_stops_reading_stops_the_stream() -> None:
    async with served(endless) as (model, door, port):
        async with connection(port, post({"prompt": "hi", "stream": True})) as (reader, writer):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await reader.readuntil(b"x")
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            assert door._server is not None
            (held,) = door._server.server_state.connections
            while not held.flow.write_paused:
                await asyncio.sleep(0)
            sent = model.sent
            for _ in range(1000):
                await asyncio.sleep(0)
            assert model.sent <= sent + 1
            assert held.transport.get_write_buffer_size() < 2**20
        await model.freed.wait()


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


async def test_a_port_in_use_is_told() -> None:
    async with served() as (_, _, port):
        door = HttpDoor(metrics_api(Watched(lambda: True, bytes)), "127.0.0.1", port, None, asyncio.Event())
        with pytest.raises(PortInUse):
            await door.open()
        await door.close()


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
