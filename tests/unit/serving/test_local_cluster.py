"""The whole way in one process: gRPC in, every role a thread, local wires. The reference for distributed runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from expertmesh.v1 import control_pb2
from expertmesh.v1 import inference_pb2 as pb
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from actors.model.experts import ExpertBank
from cluster.config import ServerConfig
from cluster.launch import running_cluster
from tests.checkpoints import WRITERS
from tests.paged_runner import random_ids
from tests.serving import VOCABULARY, Client, greedy, ids_request, swap_experts, tiny_model
from tests.waiting import until

PROMPTS = [random_ids(length, seed=length, vocab=VOCABULARY) for length in (1, 3, 17, 40, 64, 90)]
Local = Callable[..., ServerConfig]
CHUNKED = {"attention.token_budget": 48, "attention.max_running": 16}
"""The longest prompt takes two steps."""


@pytest.fixture(scope="module")
def client(checkpoint: tuple[Path, Any], local: Local) -> Iterator[Client]:
    path, _ = checkpoint
    config = local(path, **{"experts.shards": 3, "attention.replicas": 2, **CHUNKED})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        yield client
    assert not [t.name for t in threading.enumerate() if "-loop" in t.name or "-grpc" in t.name]


def blocks_in_use(client: Client) -> int:
    loads = [actor.attention for actor in client.load(control_pb2.ROLE_ATTENTION)]
    return sum(load.kv_blocks - load.kv_blocks_free + load.running + load.waiting for load in loads)


def queue_of(client: Client) -> tuple[int, int]:
    """(running, waiting) of the only attention shard."""
    (actor,) = client.load(control_pb2.ROLE_ATTENTION)
    return actor.attention.running, actor.attention.waiting


def error_of(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Status code and the details by their type's name."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    details = {}
    status = rpc_status.from_call(caught.value)
    for kind in (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
        for detail in status.details if status else ():
            found = kind()
            if detail.Unpack(found):
                details[kind.__name__] = found
    return caught.value.code(), details


@pytest.mark.parametrize("family", WRITERS)
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path, local: Local) -> None:
    """Six prompts of different length in one running batch, chunked prefill and all."""
    model = tiny_model(tmp_path, family, seed=3)
    wanted = [greedy(model, prompt, 32) for prompt in PROMPTS]
    with running_cluster(local(tmp_path, **CHUNKED)) as doors, Client(doors.grpc) as client:
        got = client.tokens_together(PROMPTS, 32)
    assert [w.agrees(g) for w, g in zip(wanted, got, strict=True)] == [True] * len(PROMPTS)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.3), ("fp8", 0.3), ("int4", 0.25)])
def test_experts_quantised_at_load(
    kind: str, share: float, checkpoint: tuple[Path, Any], local: Local, client: Client
) -> None:
    """Small in memory (of fp32, and rows of 32 and 64 numbers for each scale), near the unquantised ones in what they
    say, and the same however they are spread."""
    plain = sum(actor.weight_bytes for actor in client.load(control_pb2.ROLE_EXPERT))
    got = []
    for shards in (1, 3):
        config = local(checkpoint[0], **{"experts.quantization": kind, "experts.shards": shards})
        with running_cluster(config) as doors, Client(doors.grpc) as quantised:
            got.append(quantised.tokens_together(PROMPTS, 16))
            assert sum(actor.weight_bytes for actor in quantised.load(control_pb2.ROLE_EXPERT)) < share * plain
    assert got[0] == got[1]
    exact = client.tokens_together(PROMPTS, 16)
    assert got[0] != exact
    assert sum(ours[0] == theirs[0] for ours, theirs in zip(got[0], exact, strict=True)) >= len(PROMPTS) // 2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_all_quantised_at_load(kind: str, checkpoint: tuple[Path, Any], local: Local) -> None:
    """What attention shards hold as well: not what experts alone give, and the same however these are spread."""
    asked = {"experts.quantization": kind}
    got = []
    for more in ({}, {"attention.quantization": kind}, {"attention.quantization": kind, "experts.shards": 3}):
        with running_cluster(local(checkpoint[0], **asked, **more)) as doors, Client(doors.grpc) as quantised:
            got.append(quantised.tokens_together(PROMPTS, 16))
    assert got[0] != got[1] == got[2]


def test_swapped_experts_are_noticed(checkpoint: tuple[Path, Any], tmp_path: Path, local: Local) -> None:
    path, model = checkpoint
    swap_experts(path, tmp_path, layer=1, first=0, second=5)
    with running_cluster(local(tmp_path)) as doors, Client(doors.grpc) as client:
        got = client.tokens_together(PROMPTS, 32)
    assert not all(greedy(model, p, 32).agrees(g) for p, g in zip(PROMPTS, got, strict=True))


def test_swapped_replies_are_noticed(
    checkpoint: tuple[Path, Any], local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = checkpoint
    honest = ExpertBank.forward
    monkeypatch.setattr(ExpertBank, "forward", lambda *args: honest(*args).flip(0))
    with running_cluster(local(path)) as doors, Client(doors.grpc) as client:
        got = client.tokens_together(PROMPTS, 32)
    assert not all(greedy(model, p, 32).agrees(g) for p, g in zip(PROMPTS, got, strict=True))


def test_alone_or_together_the_tokens_are_the_same(client: Client) -> None:
    alone = [client.tokens(prompt, 24) for prompt in PROMPTS]
    assert client.tokens_together(PROMPTS, 24) == alone


def test_the_stream_has_the_promised_shape(client: Client) -> None:
    result = client.generate(ids_request(PROMPTS[2], 9))
    first, last = result.messages[0], result.messages[-1]
    assert first.started.prompt_tokens == len(PROMPTS[2])
    assert not first.token_ids
    assert not first.text
    assert not last.token_ids
    assert last.finished.reason == pb.FINISH_REASON_LENGTH
    assert (last.finished.usage.prompt_tokens, last.finished.usage.completion_tokens) == (len(PROMPTS[2]), 9)
    assert last.next_index == 9
    assert len({message.request_id for message in result.messages}) == 1
    at = 0
    for message in result.messages[1:]:
        at += len(message.token_ids)
        assert message.next_index == at


def test_resuming_gives_the_rest(client: Client) -> None:
    for sampling in (pb.SamplingParameters(temperature=0), pb.SamplingParameters(temperature=1.0, seed=11)):
        request = ids_request(PROMPTS[3], 20, request_id="resume")
        request.sampling.CopyFrom(sampling)
        whole = client.generate(request)
        # Where a message ended: several tokens share one if the client was slow.
        at = max(m.next_index for m in whole.messages if m.next_index <= 7)
        request.next_index = at
        rest = client.generate(request)
        assert rest.tokens == whole.tokens[at:]
        upto = "".join(m.text for m in whole.messages if m.next_index <= at)
        assert upto + rest.text == whole.text


def test_sampling_follows_the_seed(client: Client) -> None:
    def draw(seed: int) -> list[int]:
        request = ids_request(PROMPTS[1], 20)
        request.sampling.CopyFrom(pb.SamplingParameters(temperature=1.5, top_p=0.9, top_k=40, seed=seed))
        return client.generate(request).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_stop_ids_and_stop_strings(client: Client) -> None:
    plain = client.generate(ids_request(PROMPTS[4], 24))
    request = ids_request(PROMPTS[4], 24)
    request.stopping.stop_token_ids.append(plain.tokens[5])
    stopped = client.generate(request)
    at = plain.tokens.index(plain.tokens[5])
    assert stopped.tokens == plain.tokens[: at + 1]
    assert stopped.finished.reason == pb.FINISH_REASON_STOP

    stop = plain.text[6:8]
    request = ids_request(PROMPTS[4], 24)
    request.stopping.stop.append(stop)
    cut = client.generate(request)
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert (cut.finished.reason, cut.finished.stop) == (pb.FINISH_REASON_STOP, stop)
    until(lambda: blocks_in_use(client) == 0)


def test_chat_and_prompt(client: Client) -> None:
    chat = pb.GenerateRequest(stopping=pb.StoppingParameters(max_tokens=5))
    chat.messages.messages.add(role="user", content="hello")
    text = pb.GenerateRequest(prompt="user: hello\nassistant: ", stopping=pb.StoppingParameters(max_tokens=5))
    assert client.generate(chat).tokens == client.generate(text).tokens


def test_model_info(client: Client) -> None:
    info = client.inference.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model_type, info.vocab_size, info.context_length) == ("deepseek_v3", VOCABULARY, 512)
    assert (info.layers, info.moe_layers, info.experts_per_layer, info.experts_per_token) == (3, 2, 16, 4)
    assert info.chat
    assert info.default_sampling.temperature == 0


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "input"),
        (ids_request([VOCABULARY], 4), grpc.StatusCode.INVALID_ARGUMENT, "token_ids.ids[0]"),
        (ids_request([5] * 512, 1), grpc.StatusCode.INVALID_ARGUMENT, "token_ids.ids"),
        (ids_request([5] * 500, 13), grpc.StatusCode.INVALID_ARGUMENT, "stopping.max_tokens"),
        (ids_request([5], 4, model="gpt-9"), grpc.StatusCode.NOT_FOUND, ""),
    ],
)
def test_bad_requests_are_refused_with_the_field(
    client: Client, request_: pb.GenerateRequest, code: grpc.StatusCode, field: str
) -> None:
    got, details = error_of(lambda: client.generate(request_))
    assert got == code
    if field:
        assert details["BadRequest"].field_violations[0].field == field


def test_a_request_that_never_fits_the_cache_is_refused(checkpoint: tuple[Path, Any], local: Local) -> None:
    config = local(checkpoint[0], **{"attention.kv_memory": "100KiB", "attention.block_size": 16})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        room = client.load(control_pb2.ROLE_ATTENTION)[0].attention.kv_blocks * 16
        assert room < 512
        code, details = error_of(lambda: client.generate(ids_request([5] * (room + 1), 1)))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "BadRequest" in details
        assert len(client.tokens([5] * (room - 8), 4)) == 4


def test_a_full_queue_says_when_to_come_back(checkpoint: tuple[Path, Any], local: Local) -> None:
    config = local(checkpoint[0], **{"attention.max_running": 1, "attention.max_waiting": 1})
    with running_cluster(config) as doors, Client(doors.grpc) as client:
        held = []
        for waiting in (0, 1):  # one after the other: the first must run before the second takes its place in the queue
            held.append(client.inference.Generate(ids_request([5], 500)))
            until(lambda expected=waiting: queue_of(client) == (1, expected))
        code, details = error_of(lambda: client.generate(ids_request([5], 4)))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "QUEUE_FULL"
        assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        for call in held:
            call.cancel()


def test_deadline_and_cancel_free_everything(client: Client) -> None:
    code, _ = error_of(lambda: client.generate(ids_request(PROMPTS[0], 480), timeout=0.15))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    call = client.inference.Generate(ids_request(PROMPTS[1], 480))
    next(call)
    call.cancel()
    until(lambda: blocks_in_use(client) == 0)


def test_abort_ends_the_stream(client: Client) -> None:
    call = client.inference.Generate(ids_request(PROMPTS[1], 480, request_id="to-abort"))
    next(call)
    assert client.inference.Abort(pb.AbortRequest(request_id="to-abort")).aborted
    assert error_of(lambda: list(call))[0] == grpc.StatusCode.CANCELLED
    assert not client.inference.Abort(pb.AbortRequest(request_id="to-abort")).aborted


def test_a_client_that_comes_back_takes_its_stream_over(client: Client) -> None:
    wanted = client.tokens(PROMPTS[2], 400)
    first = client.inference.Generate(ids_request(PROMPTS[2], 400, request_id="again"))
    next(first)
    other = ids_request(PROMPTS[3], 400, request_id="again")
    assert error_of(lambda: client.generate(other))[0] == grpc.StatusCode.ALREADY_EXISTS
    again = client.generate(ids_request(PROMPTS[2], 400, request_id="again", next_index=1))
    assert again.tokens == wanted[1:]
    assert error_of(lambda: list(first))[0] == grpc.StatusCode.CANCELLED


def test_200_requests_a_third_cancelled_leave_nothing(client: Client) -> None:
    def one(number: int) -> None:
        call = client.inference.Generate(ids_request(PROMPTS[number % 6], 12 + number % 30), timeout=100)
        if number % 3 == 0:
            for _ in range(number % 5):
                next(call)
            call.cancel()
        else:
            assert sum(len(message.token_ids) for message in call) == 12 + number % 30

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(200)))
    until(lambda: blocks_in_use(client) == 0)
    assert client.load(control_pb2.ROLE_GATEWAY)[0].gateway.streams == 0


def test_health_and_status(client: Client) -> None:
    health = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", "expertmesh.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    view = client.cluster()
    assert view.expert_map_epoch == 1
    assert {wire.medium for wire in view.wires} == {"local"}
    routers = [actor.router for actor in view.actors if actor.role == control_pb2.ROLE_ROUTER]
    assert len(routers) == 2
    assert all(set(r.rows_per_shard) == {"expert-0", "expert-1", "expert-2"} for r in routers)
    experts = [actor.expert for actor in view.actors if actor.role == control_pb2.ROLE_EXPERT]
    assert sum(e.experts for e in experts) == 2 * 16
    sent = sum(sum(r.rows_per_shard.values()) for r in routers)
    assert sent == sum(e.rows for e in experts)
