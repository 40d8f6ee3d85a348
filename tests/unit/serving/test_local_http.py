"""OpenAI's own client against a whole cluster in this process."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from expertmesh.v1 import control_pb2
from expertmesh.v1 import inference_pb2 as pb
from openai import OpenAI

from cluster.access import token_hash
from cluster.config import ServerConfig
from cluster.gateway.server import Gateway
from cluster.gateway.settings import Doors
from cluster.launch import running_cluster
from tests.authority import Authority, Pair
from tests.serving import VOCABULARY, Client, ids_request
from tests.unit.serving.conftest import Actors
from tests.waiting import until

Local = Callable[..., ServerConfig]
CHAT: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
LONG = 480
USER, OTHER, ADMIN = "emt_acme's", "emt_other's", "emt_the-admin's"
TOKENS = [
    {"sha256": token_hash(USER), "tenant": "acme"},
    {"sha256": token_hash(OTHER), "tenant": "other"},
    {"sha256": token_hash(ADMIN), "tenant": "ops", "role": "admin"},
]


@contextmanager
def client_of(doors: Doors, token: str = "none", verify: ssl.SSLContext | None = None) -> Iterator[OpenAI]:
    """An OpenAI client that does not try again."""
    scheme = "http" if verify is None else "https"
    http_client = openai.DefaultHttpxClient(verify=verify) if verify is not None else None
    with OpenAI(
        base_url=f"{scheme}://{doors.http}/v1", api_key=token, max_retries=0, timeout=60, http_client=http_client
    ) as client:
        yield client


@pytest.fixture(scope="module")
def doors(checkpoint: tuple[Path, Any], local: Local) -> Iterator[Doors]:
    with running_cluster(local(checkpoint[0], **{"gateway.metrics_port": 0})) as doors:
        yield doors
    assert not [thread.name for thread in threading.enumerate() if "-loop" in thread.name or "-grpc" in thread.name]


@pytest.fixture(scope="module")
def client(doors: Doors) -> Iterator[OpenAI]:
    with client_of(doors) as client:
        yield client


@pytest.fixture(scope="module")
def over_grpc(doors: Doors) -> Iterator[Client]:
    with Client(doors.grpc) as client:
        yield client


def name_of(client: OpenAI) -> str:
    (model,) = client.models.list().data
    return model.id


def in_use(client: Client) -> int:
    loads = [actor.attention for actor in client.load(control_pb2.ROLE_ATTENTION)]
    return sum(load.kv_blocks - load.kv_blocks_free + load.running + load.waiting for load in loads)


def fetch(address: str, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, bytes]:
    """Without any client library."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


# -- answers ----------------------------------------------------------------------------------------------------------


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert model.model_dump()["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_chat_is_what_grpc_answers(client: OpenAI, over_grpc: Client) -> None:
    request = pb.GenerateRequest(stopping=pb.StoppingParameters(max_tokens=12))
    for message in CHAT:
        request.messages.messages.add(role=message["role"], content=message["content"])
    wanted = over_grpc.generate(request)
    got = client.chat.completions.create(model=name_of(client), messages=CHAT, max_completion_tokens=12)
    choice = got.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", wanted.text, "length")
    assert got.usage is not None
    usage = (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens)
    told = wanted.finished.usage
    assert usage == (told.prompt_tokens, 12, told.prompt_tokens + 12)


@pytest.mark.parametrize("prompt", ["Once upon a time", [5, 6, 7, 8], ["Once"], [[5, 6, 7]]])
def test_a_completion_is_what_grpc_answers(client: OpenAI, over_grpc: Client, prompt: Any) -> None:
    inner = prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt
    request = pb.GenerateRequest(stopping=pb.StoppingParameters(max_tokens=16))
    if isinstance(inner, str):
        request.prompt = inner
    else:
        request.token_ids.ids.extend(inner)
    got = client.completions.create(model="", prompt=prompt)
    assert got.choices[0].text == over_grpc.generate(request).text
    assert got.usage is not None
    assert got.usage.completion_tokens == 16


def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="", messages=CHAT, max_tokens=20)
    chunks = list(
        client.chat.completions.create(
            model="", messages=CHAT, max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in pieces][-2:] == [None, "length"]
    assert len(pieces) > 5
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1

    text = client.completions.create(model="", prompt="hello", max_tokens=20)
    parts = client.completions.create(model="", prompt="hello", max_tokens=20, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text


def test_stops(client: OpenAI) -> None:
    plain = client.completions.create(model="", prompt=[9, 10, 11], max_tokens=24).choices[0].text
    stop = plain[6:8]
    for given in (stop, [stop, "never"]):
        cut = client.completions.create(model="", prompt=[9, 10, 11], max_tokens=24, stop=given)
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == (plain[: plain.index(stop)], "stop")
    pieces = client.completions.create(model="", prompt=[9, 10, 11], max_tokens=24, stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == plain[: plain.index(stop)]


def test_draws_follow_the_seed(client: OpenAI, over_grpc: Client) -> None:
    def draw(seed: int) -> str:
        got = client.completions.create(
            model="", prompt=[1, 2, 3], max_tokens=20, temperature=1.5, top_p=0.9, seed=seed, extra_body={"top_k": 40}
        )
        return got.choices[0].text

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    request = ids_request([1, 2, 3], 20)
    request.sampling.CopyFrom(pb.SamplingParameters(temperature=1.5, top_p=0.9, top_k=40, seed=7))
    request.stopping.ignore_eos = False
    assert draw(7) == over_grpc.generate(request).text


def test_extra_parameters(client: OpenAI, over_grpc: Client) -> None:
    wanted = over_grpc.generate(ids_request([4, 5], 30))
    body = {"ignore_eos": True, "stop_token_ids": [wanted.tokens[3]], "top_k": -1}
    got = client.completions.create(model="", prompt=[4, 5], max_tokens=30, temperature=0, extra_body=body)
    assert got.usage is not None
    assert got.usage.completion_tokens == wanted.tokens.index(wanted.tokens[3]) + 1


def test_an_answer_can_be_sent_back(client: OpenAI) -> None:
    first = client.chat.completions.create(model="", messages=CHAT, max_tokens=4).choices[0].message
    again = [*CHAT, first.model_dump(), {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
    assert client.chat.completions.create(model="", messages=again, max_tokens=4).usage is not None


def test_many_at_once(client: OpenAI) -> None:
    def ask(number: int) -> str:
        return client.completions.create(model="", prompt=[number + 1] * 5, max_tokens=12).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == [ask(number) for number in range(16)]


# -- going away -------------------------------------------------------------------------------------------------------


def test_leaving_a_stream_frees_its_blocks(client: OpenAI, over_grpc: Client) -> None:
    stream = client.completions.create(
        model="", prompt="hello", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    assert in_use(over_grpc) > 0
    stream.close()
    until(lambda: in_use(over_grpc) == 0, timeout_s=10)


def test_leaving_without_a_stream_frees_the_blocks(doors: Doors, over_grpc: Client) -> None:
    connection = http.client.HTTPConnection(doors.http, timeout=30)
    body = {"prompt": "hello", "max_tokens": LONG, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    until(lambda: in_use(over_grpc) > 0)
    (gateway,) = over_grpc.load(control_pb2.ROLE_GATEWAY)
    connection.close()
    until(lambda: in_use(over_grpc) == 0, timeout_s=10)
    assert gateway.gateway.streams == 1


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "allowed is 0 to 2"),
        ({"top_p": 0}, "top_p", "allowed is above 0 to 1"),
        ({"max_completion_tokens": 4000}, "max_completion_tokens", "both fit the context of 512"),
        ({"max_tokens": 4000}, "max_tokens", "both fit the context of 512"),
        ({"stop": ["a", ""]}, "stop[1]", "allowed are 1 to 1000"),
        ({"messages": []}, "messages", "allowed are 1 to"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "system, user, assistant"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "NUL"),
        ({"n": 17}, "n", "allowed is 1 to 16"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported here"),
        ({"extra_body": {"surprise": 1}}, "surprise", "no parameter"),
    ],
)
def test_bad_requests_name_the_parameter(client: OpenAI, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**{"model": "", "messages": CHAT, **fields})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


def test_bad_prompts_name_it(client: OpenAI) -> None:
    for prompt, param in (
        ("a\0b", "prompt"),
        ("", "prompt"),
        ([VOCABULARY], "prompt[0]"),
        ([[1, 999]], "prompt[0][1]"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="", prompt=prompt)
        assert caught.value.param == param


def test_the_default_of_sixteen_tokens_is_cut_to_the_room(client: OpenAI) -> None:
    got = client.completions.create(model="", prompt=[5] * 505, extra_body={"ignore_eos": True})
    assert got.usage is not None
    assert (got.usage.completion_tokens, got.choices[0].finish_reason) == (7, "length")
    with pytest.raises(openai.BadRequestError, match="is 16 after a prompt of 505 tokens") as caught:
        client.completions.create(model="", prompt=[5] * 505, max_tokens=16)
    assert caught.value.param == "max_tokens"


def test_another_model(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-9", messages=CHAT, stream=stream)
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_bodies_that_are_none(doors: Doors) -> None:
    def status(body: str, kind: str = "application/json") -> int:
        return fetch(doors.http, "/v1/completions", "POST", body, content_type=kind)[0]

    assert status("{") == 400
    assert status("[" * 50_000) == 400
    assert status('{"prompt": "\\ud800"}') == 400
    assert status("prompt=hello", "application/x-www-form-urlencoded") == 415
    assert status("x" * (2**20 + 64 * 512 + 1)) == 413


def test_a_full_queue_says_when_to_come_back(checkpoint: tuple[Path, Any], local: Local) -> None:
    config = local(checkpoint[0], **{"attention.max_running": 1, "attention.max_waiting": 1})
    with running_cluster(config) as doors, Client(doors.grpc) as over_grpc, client_of(doors) as client:
        held = []
        for waiting in (0, 1):  # one after the other: the first must run before the second takes its place in the queue
            held.append(over_grpc.inference.Generate(ids_request([5], 500)))
            until(lambda expected=waiting: queue_of(over_grpc) == (1, expected))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="", prompt="hello", stream=True)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for call in held:
            call.cancel()


def queue_of(client: Client) -> tuple[int, int]:
    """(running, waiting) of the only attention shard."""
    (actor,) = client.load(control_pb2.ROLE_ATTENTION)
    return actor.attention.running, actor.attention.waiting


def test_while_it_drains(checkpoint: tuple[Path, Any], local: Local, actors: Actors) -> None:
    """What runs may end, what comes is sent elsewhere."""
    with running_cluster(local(checkpoint[0])) as doors, client_of(doors) as client, ThreadPoolExecutor(1) as pool:
        (gateway,) = actors.of(Gateway)
        stream = client.completions.create(
            model="", prompt="hello", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        assert fetch(doors.http, "/health") == (200, b'{"status":"ok"}')
        stopped = pool.submit(gateway.stop)
        until(lambda: fetch(doors.http, "/health")[0] == 503)
        with client_of(doors) as late, pytest.raises(openai.InternalServerError) as caught:
            late.completions.create(model="", prompt="hello")
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        assert caught.value.response.headers["connection"] == "close"
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        stopped.result(30)


# -- who may ----------------------------------------------------------------------------------------------------------


def test_tokens_and_tenants(checkpoint: tuple[Path, Any], local: Local) -> None:
    with running_cluster(local(checkpoint[0], **{"access.tokens": TOKENS})) as doors:
        with client_of(doors, "wrong") as nobody, pytest.raises(openai.AuthenticationError) as refused:
            nobody.models.list()
        assert refused.value.code == "invalid_api_key"
        with client_of(doors, USER) as user:
            with pytest.raises(openai.PermissionDeniedError):
                user.get("http://" + doors.http + "/metrics", cast_to=object)
            stream = user.completions.create(
                model="", prompt="hello", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
            )
            request_id = next(stream).id.removeprefix("cmpl-")
            assert not abort(doors, OTHER, request_id)
            assert abort(doors, USER, request_id)
            with pytest.raises(openai.APIError, match="cancelled"):
                list(stream)
        assert fetch(doors.http, "/metrics", authorization=f"Bearer {ADMIN}")[0] == 200
        assert fetch(doors.http, "/health")[0] == 200


def abort(doors: Doors, token: str, request_id: str) -> bool:
    with Client(doors.grpc) as client:
        metadata = [("authorization", f"Bearer {token}")]
        return bool(
            client.inference.Abort(pb.AbortRequest(request_id=request_id), metadata=metadata, timeout=30).aborted
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def trusting(authority: Authority, pair: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.certificate)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


def test_mutual_tls(checkpoint: tuple[Path, Any], local: Local, authority: Authority) -> None:
    server, own = authority.sign("127.0.0.1"), authority.sign("client@acme.example")
    tls = {"certificate": str(server.certificate), "key": str(server.key), "client_ca": str(authority.certificate)}
    with running_cluster(local(checkpoint[0], **{"gateway.tls": tls})) as doors:
        with client_of(doors, verify=trusting(authority, own)) as client:
            assert client.completions.create(model="", prompt="hello", max_tokens=2).usage is not None
        for verify in (trusting(authority), ssl.create_default_context(), None):
            with client_of(doors, verify=verify) as stranger, pytest.raises(openai.APIConnectionError):
                stranger.models.list()


def test_the_plaintext_door_for_metrics(doors: Doors) -> None:
    status, text = fetch(doors.metrics, "/metrics")
    assert status == 200
    assert b"# TYPE" in text
    assert fetch(doors.metrics, "/health")[0] == 200
    assert fetch(doors.metrics, "/v1/models")[0] == 404
