"""Several answers to one request, and whatever else may be asked of sampling, through both doors of a whole cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from expertmesh.v1 import control_pb2
from expertmesh.v1 import inference_pb2 as pb
from openai import OpenAI

from actors.attention import AttentionShard
from actors.engine.request import GenerationRequest, SamplingParams
from cluster.config import ServerConfig
from cluster.gateway.settings import Doors
from cluster.launch import running_cluster
from tests.processes import run
from tests.serving import Client, ids_request
from tests.unit.serving.conftest import Actors
from tests.unit.serving.test_replay import Gate
from tests.waiting import until

Local = Callable[..., ServerConfig]
PROMPT = [5, 6, 7, 8, 9]
COUNT = 24
CHAT: Any = [{"role": "user", "content": "hello"}]
PENALTIES: Any = {"presence_penalty": 0.5, "frequency_penalty": -0.5}


@pytest.fixture(scope="module")
def doors(checkpoint: tuple[Path, Any], local: Local) -> Iterator[Doors]:
    with running_cluster(local(checkpoint[0])) as doors:
        yield doors


@pytest.fixture(scope="module")
def client(doors: Doors) -> Iterator[Client]:
    with Client(doors.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def over_http(doors: Doors) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://{doors.http}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.allow(None)


def drawn(n: int, count: int = COUNT, **fields: Any) -> pb.GenerateRequest:
    request = ids_request(PROMPT, count, n=n, **fields)
    request.sampling.CopyFrom(pb.SamplingParameters(temperature=1.5, seed=11))
    return request


def tokens_of(messages: list[pb.GenerateResponse], n: int) -> list[list[int]]:
    """By choice; each message continues the one of its choice before."""
    found: list[list[int]] = [[] for _ in range(n)]
    for message in messages:
        found[message.choice] += message.token_ids
        assert message.next_index == len(found[message.choice])
    return found


def in_use(client: Client) -> int:
    loads = [actor.attention for actor in client.load(control_pb2.ROLE_ATTENTION)]
    return sum(load.running + load.waiting for load in loads)


def published(client: Client) -> int:
    (shard,) = client.load(control_pb2.ROLE_ATTENTION)
    return int(shard.attention.tokens)


def test_the_choices_of_a_seed_are_always_the_same(client: Client) -> None:
    first, again = [client.generate(drawn(3)).messages for _ in range(2)]
    choices = tokens_of(first, 3)
    assert choices == tokens_of(again, 3)
    assert len({tuple(choice) for choice in choices}) == 3
    assert choices[0] == client.generate(drawn(1)).tokens, "the first is what a request for one gets"
    assert choices[:2] == tokens_of(client.generate(drawn(2)).messages, 2)
    assert [message.HasField("started") for message in first] == [True] + [False] * (len(first) - 1)
    ends = [message for message in first if message.HasField("finished")]
    assert sorted(end.choice for end in ends) == [0, 1, 2]
    assert {(end.finished.usage.prompt_tokens, end.finished.usage.completion_tokens) for end in ends} == {(5, COUNT)}


def test_greedy_choices_are_equal(client: Client) -> None:
    wanted = client.tokens(PROMPT, COUNT)
    assert tokens_of(client.generate(ids_request(PROMPT, COUNT, n=4)).messages, 4) == [wanted] * 4


def test_a_stop_ends_its_choice_alone(client: Client) -> None:
    choices = tokens_of(client.generate(drawn(2)).messages, 2)
    (stop, at) = next((token, at) for at, token in enumerate(choices[1]) if at > 2 and token not in choices[0])
    request = drawn(2)
    request.stopping.stop_token_ids.append(stop)
    messages = client.generate(request).messages
    assert tokens_of(messages, 2) == [choices[0], choices[1][: choices[1].index(stop) + 1]]
    reasons = {m.choice: m.finished.reason for m in messages if m.HasField("finished")}
    assert reasons == {0: pb.FINISH_REASON_LENGTH, 1: pb.FINISH_REASON_STOP}
    assert at > 2


def test_a_stop_string_frees_its_choice_at_once(client: Client) -> None:
    request = drawn(2, count=400)
    texts = ["", ""]
    for message in client.generate(request).messages:
        texts[message.choice] += message.text
    stop = next(texts[1][at : at + 2] for at in range(100) if texts[1][at : at + 2] not in texts[0])
    request.stopping.stop.append(stop)
    before = published(client)
    messages = client.generate(request).messages
    reasons = {m.choice: m.finished.reason for m in messages if m.HasField("finished")}
    assert reasons == {0: pb.FINISH_REASON_LENGTH, 1: pb.FINISH_REASON_STOP}
    assert "".join(m.text for m in messages if m.choice == 1) == texts[1][: texts[1].index(stop)]
    assert published(client) - before < 600, "nothing is computed for nobody"


def test_whoever_leaves_ends_all_choices(client: Client) -> None:
    call = client.inference.Generate(drawn(8, count=480), timeout=60)
    next(call)
    call.cancel()
    until(lambda: in_use(client) == 0)


def test_an_abort_ends_all_choices(client: Client) -> None:
    call = client.inference.Generate(drawn(8, count=480, request_id="many"), timeout=60)
    next(call)
    assert client.inference.Abort(pb.AbortRequest(request_id="many")).aborted
    with pytest.raises(grpc.RpcError) as ended:
        list(call)
    assert ended.value.code() == grpc.StatusCode.CANCELLED  # type: ignore[attr-defined]
    until(lambda: in_use(client) == 0)


def test_all_choices_outlive_their_shard(
    checkpoint: tuple[Path, Any], local: Local, actors: Actors, gate: Gate
) -> None:
    config = local(checkpoint[0], **{"attention.replicas": 2})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        wanted = tokens_of(client.generate(drawn(3)).messages, 3)
        shards: list[AttentionShard] = actors.of(AttentionShard)
        gate.reset()
        call = client.inference.Generate(drawn(3), timeout=60)
        until(lambda: any(gate.stands(shard) for shard in shards))
        (shard,) = [shard for shard in shards if gate.stands(shard)]
        assert shard.stats().running + shard.stats().waiting == 3, "they are on one shard"
        gate.allow(9)
        messages = [next(call) for _ in range(6)]
        until(lambda: gate.stands(shard))
        stop = threading.Thread(target=shard.stop)
        stop.start()  # it waits for the step that the shard is in
        gate.allow(None)
        stop.join()
        assert tokens_of([*messages, *call], 3) == wanted
        assert actors["gateway-0"].stats().replays == 3


def test_a_shard_takes_all_or_none(checkpoint: tuple[Path, Any], local: Local, actors: Actors) -> None:
    with running_cluster(local(checkpoint[0])):
        (shard,) = actors.of(AttentionShard)
        good = GenerationRequest("x/0", (1, 2), SamplingParams(), max_tokens=2, gateway="gateway-0")
        endless = GenerationRequest("x/1", (1,) * 10_000, SamplingParams(), max_tokens=2, gateway="gateway-0")
        refusal = shard.submit((good, endless))
        assert refusal is not None
        assert refusal.field == "prompt_ids"
        stats = shard.stats()
        assert (stats.running, stats.waiting, shard.abort("x/0")) == (0, 0, False)
        assert shard.submit((good,)) is None, "its id was not used"
        until(lambda: shard.stats().tokens == 2)


# -- the HTTP door ----------------------------------------------------------------------------------------------------


def test_several_answers_over_http_are_those_over_grpc(client: Client, over_http: OpenAI) -> None:
    asked = client.generate(drawn(3))
    texts = ["".join(m.text for m in asked.messages if m.choice == choice) for choice in range(3)]
    fields: Any = {"model": "", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 1.5, "seed": 11, "n": 3}
    fields["extra_body"] = {"ignore_eos": True}
    whole = over_http.completions.create(**fields)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [
        (index, text, "length") for index, text in enumerate(texts)
    ]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 3 * COUNT)
    *chunks, last = over_http.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    found = ["", "", ""]
    for chunk in chunks:
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == texts
    assert (last.choices, last.usage) == ([], whole.usage)


def test_a_chat_with_several_answers(over_http: OpenAI) -> None:
    fields: Any = {"model": "", "messages": CHAT, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 2}
    whole = over_http.chat.completions.create(**fields)
    chunks = list(over_http.chat.completions.create(**fields, stream=True))
    texts = [
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices[0].index == index)
        for index in range(2)
    ]
    assert texts == [choice.message.content for choice in whole.choices]
    ends = [(chunk.choices[0].index, chunk.choices[0].finish_reason) for chunk in chunks]
    assert sorted(index for index, reason in ends if reason) == [0, 1]


def test_every_parameter_is_taken(over_http: OpenAI) -> None:
    extra = {
        "min_p": 0.1,
        "top_k": 50,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "priority": "batch",
        "ignore_eos": True,
    }
    got = over_http.chat.completions.create(
        model="", messages=CHAT, max_tokens=4, temperature=1, logit_bias={"5": 2}, extra_body=extra, **PENALTIES
    )
    assert got.usage is not None
    assert got.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 17}, "n"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"min_tokens": 9}}, "min_tokens"),
        ({"extra_body": {"allowed_token_ids": [1, 300]}}, "allowed_token_ids[1]"),
        ({"extra_body": {"allowed_token_ids": [1], "min_tokens": 1}}, "allowed_token_ids"),
        ({"extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs"),
        ({"extra_body": {"priority": "urgent"}}, "priority"),
    ],
)
def test_wrong_values_are_refused_by_name(over_http: OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        over_http.chat.completions.create(model="", messages=CHAT, max_tokens=4, **fields)
    assert refused.value.param == param


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_shows_several_answers(doors: Doors, client: Client) -> None:
    options = ("--raw", "--max-tokens", "6", "--temperature", "1", "--seed", "3", "--n", "2", "--priority", "batch")
    done = run("generate", "hello", "--target", doors.grpc, *options)
    request = pb.GenerateRequest(prompt="hello", n=2, sampling=pb.SamplingParameters(temperature=1, seed=3))
    request.stopping.max_tokens = 6
    messages = client.generate(request).messages
    texts = ["".join(m.text for m in messages if m.choice == choice) for choice in range(2)]
    assert (done.returncode, done.stdout) == (0, f"[1]\n{texts[0]}\n[2]\n{texts[1]}\n")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--min-p", "2", "sampling.min_p: is 2; allowed is 0 to 1"),
        ("--repetition-penalty", "nan", "sampling.repetition_penalty: is nan; allowed is above 0 to 2"),
        ("--presence-penalty", "-2.5", "sampling.presence_penalty: is -2.5; allowed is -2 to 2"),
        ("--frequency-penalty", "3", "sampling.frequency_penalty: is 3; allowed is -2 to 2"),
        ("--min-tokens", "600", "stopping.min_tokens: is 600; allowed is 0 to max_tokens"),
    ],
)
def test_wrong_options_give_one_clear_line(doors: Doors, option: str, value: str, told: str) -> None:
    done = run("generate", "hello", "--target", doors.grpc, option, value)
    assert (done.returncode, done.stdout.strip()) == (1, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
