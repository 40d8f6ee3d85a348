from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from expertmesh.v1 import inference_pb2 as pb
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.request import Priority, SamplingParams
from cluster.gateway.chat import ChatTemplate
from cluster.gateway.errors import FailedPrecondition, InvalidRequest, ServiceError, UnknownModel
from cluster.gateway.served_model import ServedModel
from cluster.gateway.tokenizer import Tokenizer
from cluster.gateway.validation import MAX_PROMPT_LOGPROBS, ValidRequest, random_seed, validate
from tests.unit.gateway.tiny_tokenizers import BOS, byte_level

WIDTH, CONTEXT = 300, 32
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
MODEL = ServedModel(
    name="tiny",
    model_type="glm4_moe",
    dtype="float32",
    context_length=CONTEXT,
    vocab_size=WIDTH,
    layers=2,
    moe_layers=1,
    experts_per_layer=4,
    experts_per_token=2,
    stop_ids=frozenset({265}),
    default_sampling=SamplingParams(),
    tokenizer=byte_level(),
    chat=ChatTemplate(TEMPLATE, {"bos_token": BOS}),
)
SAMPLED = dataclasses.replace(MODEL, default_sampling=SamplingParams(0.6, 0.9, 40))


def check(model: ServedModel = MODEL, **fields: Any) -> ValidRequest:
    if not {"prompt", "token_ids", "messages"} & fields.keys():
        fields["token_ids"] = {"ids": [1, 2, 3]}
    request = pb.GenerateRequest(**fields)
    return validate(request, model, draw_seed=lambda: 77, draw_request_id=lambda: "drawn")


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


class NoTokenizer(Tokenizer):
    """Fails the test when something is tokenised."""

    def __init__(self) -> None:
        """Needs no files."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("tokenised what had to be refused before")


def test_what_is_left_out_is_filled_in() -> None:
    assert check() == ValidRequest(
        request_id="drawn",
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=77),
        seed_given=False,
        max_tokens=CONTEXT - 3,
        stop_ids=MODEL.stop_ids,
        stops=(),
        next_index=0,
    )


def test_what_is_given_is_taken() -> None:
    valid = check(
        model=SAMPLED,
        request_id="r-1",
        sampling={"temperature": 0, "top_p": 0.5, "top_k": 0, "seed": 2**64 - 1},
        stopping={"max_tokens": 4, "stop": ["x", "yz"], "stop_token_ids": [0, WIDTH - 1]},
        next_index=4,
    )
    assert valid == ValidRequest(
        request_id="r-1",
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(temperature=0.0, top_p=0.5, top_k=0, seed=2**64 - 1),
        seed_given=True,
        max_tokens=4,
        stop_ids=frozenset({0, WIDTH - 1, 265}),
        stops=("x", "yz"),
        next_index=4,
    )


def test_unset_parameters_take_the_models_defaults() -> None:
    assert check(model=SAMPLED).sampling == SamplingParams(0.6, 0.9, 40, seed=77)
    assert check(model=SAMPLED, sampling={"top_k": 0}).sampling == SamplingParams(0.6, 0.9, 0, seed=77)


def test_a_seed_of_zero_is_a_seed() -> None:
    valid = check(sampling={"seed": 0})
    assert (valid.sampling.seed, valid.seed_given) == (0, True)


def test_drawn_seeds_differ_and_fit() -> None:
    seeds = {random_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds) < 2**53


def test_ignored_end_of_sequence_leaves_the_clients_ids() -> None:
    stopping = {"ignore_eos": True, "stop_token_ids": [9]}
    assert check(stopping=stopping).stop_ids == {9}
    assert check(stopping={"ignore_eos": False}).stop_ids == MODEL.stop_ids


def test_the_three_inputs() -> None:
    encode = MODEL.tokenizer.encode
    assert check(prompt=f"{BOS}hello").prompt_ids == tuple(encode(f"{BOS}hello"))
    assert len(check(prompt=f"{BOS}hello").prompt_ids) == 2
    messages = chat(("system", "be"), ("user", "hello"), ("assistant", ""))
    assert check(messages=messages).prompt_ids == tuple(encode(f"{BOS}[system]be[user]hello[assistant]"))
    assert check(token_ids={"ids": [WIDTH - 1]}).prompt_ids == (WIDTH - 1,)


def test_the_served_model_goes_by_its_name_or_none() -> None:
    assert check(model=MODEL).prompt_ids
    assert validate(pb.GenerateRequest(model="tiny", prompt="x"), MODEL).prompt_ids
    with pytest.raises(UnknownModel, match="'other' is not served here; served is 'tiny'"):
        validate(pb.GenerateRequest(model="other", prompt="x"), MODEL)


@pytest.mark.parametrize(("prompt", "asked", "cut"), [(10, 16, 16), (CONTEXT - 7, 16, 7), (CONTEXT - 1, 16, 1)])
def test_a_doors_own_limit_is_cut_to_the_room(prompt: int, asked: int, cut: int) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * prompt))
    request.stopping.max_tokens = asked
    assert validate(request, MODEL, cut_max_tokens=True).max_tokens == cut
    request.stopping.max_tokens = 0
    with pytest.raises(InvalidRequest, match="is 0"):
        validate(request, MODEL, cut_max_tokens=True)


def test_all_sampling_parameters_are_taken() -> None:
    valid = check(
        sampling={
            "min_p": 0.25,
            "repetition_penalty": 1.5,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.75,
            "logit_bias": {9: -100.0, 2: 1.5},
            "allowed_token_ids": [9, 2, 9, 4],
            "banned_token_ids": [4, 3],
            "seed": 1,
        },
        stopping={"min_tokens": 2, "max_tokens": 2},
        n=16,
        logprobs=0,
        prompt_logprobs=20,
        priority=pb.PRIORITY_BATCH,
    )
    assert valid.sampling == SamplingParams(
        seed=1,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias=((2, 1.5), (9, -100.0)),
        allowed_ids=(2, 4, 9),
        banned_ids=(3, 4),
        min_tokens=2,
        logprobs=0,
    )
    assert (valid.n, valid.prompt_logprobs, valid.priority) == (16, 20, Priority.BATCH)
    usual = check()
    assert (usual.n, usual.prompt_logprobs, usual.priority, usual.sampling.logprobs) == (1, None, 0, None)


LONG = dataclasses.replace(MODEL, context_length=2**20)


def asks(tokens: int, likeliest: int, n: int = 1) -> ValidRequest:
    return check(LONG, token_ids={"ids": [7] * tokens}, prompt_logprobs=likeliest, n=n)


@pytest.mark.parametrize(
    ("tokens", "likeliest", "n"), [(200_000, 0, 1), (100_000, 1, 1), (9_523, 20, 1), (6_250, 1, 16)]
)
def test_log_probabilities_of_the_prompt_are_bounded(tokens: int, likeliest: int, n: int) -> None:
    assert asks(tokens, likeliest, n).prompt_entries == tokens * (1 + likeliest) <= MAX_PROMPT_LOGPROBS
    with pytest.raises(InvalidRequest) as caught:
        asks(tokens + 1, likeliest, n)
    assert caught.value.field == "prompt_logprobs"
    assert f"is {likeliest} for {tokens + 1} prompt tokens and n {n}; allowed" in caught.value.description
    assert str(MAX_PROMPT_LOGPROBS) in caught.value.description
    assert check(LONG, token_ids={"ids": [7] * 300_000}).prompt_entries == 0


@pytest.mark.parametrize("likeliest", range(21))
def test_the_most_of_them_fit_a_message_as_clients_take_it(likeliest: int) -> None:
    """gRPC's clients take 4 MiB; ids and ranks are as long as a vocabulary of 2**28 makes them."""
    top = [pb.TokenLogprob(token_id=2**28 - 1, logprob=-1.0)] * likeliest
    entry = pb.TokenLogprobs(token_id=2**28 - 1, logprob=-1.0, rank=2**28 - 1, top=top)
    size = pb.Started(prompt_logprobs=[entry]).ByteSize() * (MAX_PROMPT_LOGPROBS // (1 + likeliest))
    assert size <= 19 * MAX_PROMPT_LOGPROBS < 4 * 2**20 - 10_000


def test_an_answer_may_be_any_as_long_as_one_token_may_come() -> None:
    assert check(sampling={"allowed_token_ids": [265]}).sampling.allowed_ids == (265,), "held back by nothing"
    assert check(sampling={"allowed_token_ids": [265, 1]}, stopping={"min_tokens": 1}).sampling.min_tokens == 1
    assert check(
        sampling={"allowed_token_ids": [265]}, stopping={"min_tokens": 1, "ignore_eos": True}
    ).sampling.min_tokens
    assert check(sampling={"banned_token_ids": range(WIDTH - 1)}).sampling.banned_ids
    wide = dataclasses.replace(MODEL, stop_ids=frozenset({WIDTH + 5}))  # an id that the model cannot give
    assert check(model=wide, stopping={"min_tokens": 1}).stop_ids == {WIDTH + 5}


def test_limits_are_allowed() -> None:
    edge = {"min_p": 1, "repetition_penalty": 2, "presence_penalty": -2, "frequency_penalty": 2}
    assert check(sampling={**edge, "logit_bias": {0: 100}}).sampling.presence_penalty == -2
    assert check(logprobs=20, stopping={"min_tokens": CONTEXT - 3}).sampling.min_tokens == CONTEXT - 3
    assert check(token_ids={"ids": [1] * (CONTEXT - 1)}).max_tokens == 1
    assert check(token_ids={"ids": [1] * 10}, stopping={"max_tokens": CONTEXT - 10}).max_tokens == CONTEXT - 10
    assert check(request_id="!" + "~" * 127).request_id == "!" + "~" * 127
    assert check(sampling={"temperature": 2, "top_p": 1, "top_k": 2**31 - 1}).sampling.top_k == 2**31 - 1
    assert len(check(stopping={"stop": ["s" * 1000] * 16, "stop_token_ids": [1] * 16}).stops) == 16


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"prompt": ""}, "prompt", "is empty; allowed"),
        ({"prompt": "a\0b"}, "prompt", "NUL at character 1"),
        ({"prompt": "z" * CONTEXT}, "prompt", f"has {CONTEXT} tokens; allowed are up to {CONTEXT - 1}"),
        ({"prompt": "z" * (32 * CONTEXT + 1)}, "prompt", f"characters; allowed are up to {32 * CONTEXT}"),
        ({"token_ids": {}}, "token_ids.ids", "is empty; allowed"),
        ({"token_ids": {"ids": [1, WIDTH]}}, "token_ids.ids[1]", f"is token id {WIDTH}; allowed is 0 to 299"),
        ({"token_ids": {"ids": [2**32 - 1]}}, "token_ids.ids[0]", "allowed is 0 to 299"),
        ({"token_ids": {"ids": [1] * CONTEXT}}, "token_ids.ids", "has 32 tokens"),
        ({"messages": {}}, "messages", "has 0 messages; allowed are 1 to 4096"),
        ({"messages": chat(*[("user", "")] * 4097)}, "messages", "has 4097 messages"),
        ({"messages": chat(("user", "x"), ("root", "x"))}, "messages.messages[1].role", "system, user, assistant"),
        ({"messages": chat(("", "x"))}, "messages.messages[0].role", "is ''; allowed"),
        ({"messages": chat(("user", "\0"))}, "messages.messages[0].content", "NUL at character 0"),
        ({"messages": chat(("user", "z" * 600), ("user", "z" * 600))}, "messages", "has 1200 characters"),
        ({"messages": chat(("user", "z" * 40))}, "messages", "tokens; allowed are up to"),
        ({"sampling": {"temperature": math.nan}}, "sampling.temperature", "is nan; allowed is 0 to 2"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature", "allowed is 0 to 2"),
        ({"sampling": {"temperature": 2.001}}, "sampling.temperature", "allowed is 0 to 2"),
        ({"sampling": {"temperature": math.inf}}, "sampling.temperature", "is inf"),
        ({"sampling": {"top_p": math.nan}}, "sampling.top_p", "is nan; allowed is above 0 to 1"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p", "is 0;"),
        ({"sampling": {"top_p": -1}}, "sampling.top_p", "is -1;"),
        ({"sampling": {"top_p": 1.001}}, "sampling.top_p", "allowed is above 0 to 1"),
        ({"sampling": {"top_k": 2**31}}, "sampling.top_k", "allowed is 0 (all) to 2147483647"),
        ({"stopping": {"max_tokens": 0}}, "stopping.max_tokens", "is 0 after a prompt of 3 tokens; allowed is 1 to 29"),
        ({"stopping": {"max_tokens": 30}}, "stopping.max_tokens", "allowed is 1 to 29"),
        ({"stopping": {"stop": ["s"] * 17}}, "stopping.stop", "has 17 strings; allowed are up to 16"),
        ({"stopping": {"stop": ["s", ""]}}, "stopping.stop[1]", "has 0 characters; allowed are 1 to 1000"),
        ({"stopping": {"stop": ["s" * 1001]}}, "stopping.stop[0]", "has 1001 characters"),
        ({"stopping": {"stop": ["\0"]}}, "stopping.stop[0]", "NUL"),
        ({"stopping": {"stop_token_ids": [1] * 17}}, "stopping.stop_token_ids", "has 17 ids; allowed are up to 16"),
        ({"stopping": {"stop_token_ids": [WIDTH]}}, "stopping.stop_token_ids[0]", "allowed is 0 to 299"),
        ({"request_id": "r" * 129}, "request_id", "of 129 characters; allowed are 1 to 128 printable ASCII"),
        ({"request_id": "a b"}, "request_id", "without spaces"),
        ({"request_id": "é"}, "request_id", "is '\\xe9' of 1 characters"),
        ({"request_id": "a\n"}, "request_id", "is 'a\\n'"),
        ({"request_id": "a\x7f"}, "request_id", "printable ASCII"),
        *(
            ({"sampling": {name: value}}, f"sampling.{name}", f"allowed is {allowed}")
            for name, allowed, values in [
                ("min_p", "0 to 1", (-0.1, 1.001, math.nan)),
                ("repetition_penalty", "above 0 to 2", (0, -1, 2.001, math.nan, math.inf)),
                ("presence_penalty", "-2 to 2", (-2.001, 2.001, math.nan)),
                ("frequency_penalty", "-2 to 2", (-2.001, 2.001, -math.inf)),
            ]
            for value in values
        ),
        ({"sampling": {"logit_bias": {7: 100.5}}}, "sampling.logit_bias[7]", "is 100.5; allowed is -100 to 100"),
        ({"sampling": {"logit_bias": {7: math.nan}}}, "sampling.logit_bias[7]", "is nan; allowed"),
        ({"sampling": {"logit_bias": {WIDTH: 1}}}, "sampling.logit_bias", f"has token id {WIDTH}; allowed is 0 to 299"),
        (
            {"sampling": {"logit_bias": dict.fromkeys(range(1025), 1)}},
            "sampling.logit_bias",
            "has 1025 ids; allowed are up to 1024",
        ),
        ({"sampling": {"allowed_token_ids": [1] * 1025}}, "sampling.allowed_token_ids", "allowed are up to 1024"),
        ({"sampling": {"banned_token_ids": [1] * 1025}}, "sampling.banned_token_ids", "allowed are up to 1024"),
        ({"sampling": {"allowed_token_ids": [WIDTH]}}, "sampling.allowed_token_ids[0]", "allowed is 0 to 299"),
        ({"sampling": {"banned_token_ids": [1, WIDTH]}}, "sampling.banned_token_ids[1]", "allowed is 0 to 299"),
        (
            {"sampling": {"allowed_token_ids": [1, 2], "banned_token_ids": [2, 1]}},
            "sampling.allowed_token_ids",
            "at least one is needed that is not banned",
        ),
        (
            {
                "sampling": {"allowed_token_ids": [1, 2, 265], "banned_token_ids": [2]},
                "stopping": {"min_tokens": 1, "stop_token_ids": [1]},
            },
            "sampling.allowed_token_ids",
            "is neither banned nor a stop id, which min_tokens 1 holds back",
        ),
        ({"sampling": {"banned_token_ids": range(WIDTH)}}, "sampling.banned_token_ids", "of the vocabulary"),
        (
            {"sampling": {"banned_token_ids": [i for i in range(WIDTH) if i != 265]}, "stopping": {"min_tokens": 1}},
            "sampling.banned_token_ids",
            "neither banned nor a stop id",
        ),
        ({"stopping": {"min_tokens": 5, "max_tokens": 4}}, "stopping.min_tokens", "is 5; allowed is 0 to max_tokens"),
        ({"stopping": {"min_tokens": CONTEXT - 2}}, "stopping.min_tokens", "which is 29"),
        ({"n": 0}, "n", "is 0; allowed is 1 to 16"),
        ({"n": 2**32 - 1}, "n", "is 4294967295; allowed is 1 to 16"),
        ({"n": 2, "next_index": 1, "request_id": "r"}, "next_index", "is 1 for n 2; allowed is 0"),
        ({"logprobs": 21}, "logprobs", "is 21; allowed is 0 to 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "is 21; allowed is 0 to 20"),
        ({"priority": 3}, "priority", "is 3; allowed are PRIORITY_UNSPECIFIED, PRIORITY_INTERACTIVE, PRIORITY_BATCH"),
        ({"next_index": 1}, "request_id", "is needed to resume at next_index 1"),
        ({"next_index": 30, "request_id": "r"}, "next_index", "is 30; allowed is up to the 29 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_served_names_its_field(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**fields)
    assert caught.value.field == field
    assert says in caught.value.description


def test_no_input_is_named() -> None:
    with pytest.raises(InvalidRequest, match="input: is missing; one of prompt, token_ids, messages"):
        validate(pb.GenerateRequest(), MODEL)


def test_a_model_without_template_does_not_chat() -> None:
    with pytest.raises(InvalidRequest, match="messages: chat is not available for model 'tiny'"):
        check(model=dataclasses.replace(MODEL, chat=None), messages=chat(("user", "hi")))


def test_text_may_encode_to_ids_the_model_has_no_row_for() -> None:
    narrow = dataclasses.replace(MODEL, vocab_size=264)
    with pytest.raises(InvalidRequest, match=r"prompt\[0\]: is token id 264; allowed is 0 to 263"):
        check(model=narrow, prompt=BOS)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "z" * (32 * CONTEXT + 1)},
        {"prompt": "hi", "sampling": {"top_p": 0}},
        {"prompt": "hi", "stopping": {"stop": [""]}},
        {"prompt": "hi", "request_id": " "},
        {"messages": chat(("user", "z" * (32 * CONTEXT + 1)))},
        {"messages": chat(*[("user", "z")] * (32 * CONTEXT))},  # renders to more than it says
    ],
)
def test_nothing_is_tokenised_that_is_refused_for_less(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        check(model=dataclasses.replace(MODEL, tokenizer=NoTokenizer()), **fields)


def test_a_sampled_stream_needs_its_seed_to_resume() -> None:
    with pytest.raises(FailedPrecondition, match=r"next_index is 2 .* without sampling\.seed"):
        check(model=SAMPLED, request_id="r", next_index=2)
    assert check(model=SAMPLED, request_id="r", next_index=2, sampling={"seed": 5}).next_index == 2
    assert check(model=SAMPLED, request_id="r", next_index=2, sampling={"temperature": 0}).next_index == 2
    assert check(request_id="r", next_index=CONTEXT - 3).next_index == CONTEXT - 3


def test_no_error_quotes_the_prompt() -> None:
    secret = "my-secret"
    for fields in (
        {"prompt": secret + "\0"},
        {"prompt": secret * 10},
        {"prompt": secret, "stopping": {"max_tokens": 99}},
        {"messages": chat(("user", secret), ("nobody", secret))},
        {"messages": chat(("user", secret * 10))},
        {"stopping": {"stop": [secret * 200]}},
    ):
        with pytest.raises(InvalidRequest) as caught:
            check(**fields)
        assert secret not in str(caught.value)


WHOLE = pb.GenerateRequest(
    model="tiny",
    messages=pb.ChatMessages(messages=chat(("system", "be"), ("user", "hi"))["messages"]),
    sampling=pb.SamplingParameters(
        temperature=0.5, top_p=0.5, top_k=3, seed=1, min_p=0.5, logit_bias={1: 1}, allowed_token_ids=[1, 2]
    ),
    stopping=pb.StoppingParameters(max_tokens=3, min_tokens=1, stop=["a"], stop_token_ids=[1], ignore_eos=True),
    request_id="r",
    next_index=2,
    n=1,
    logprobs=1,
    prompt_logprobs=1,
    priority=pb.PRIORITY_BATCH,
).SerializeToString()


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=3),
    tail=st.binary(max_size=8),
)
def test_any_message_is_served_or_refused_with_a_reason(edits: list[tuple[int, int]], tail: bytes) -> None:
    """Bytes that parse as a request never end in another error than the service's own."""
    data = bytearray(WHOLE + tail)
    for position, value in edits:
        data[position] = value
    request = pb.GenerateRequest()
    try:
        request.ParseFromString(bytes(data))
    except DecodeError:
        return
    try:
        valid = validate(request, MODEL)
    except ServiceError:
        return
    assert 1 <= len(valid.prompt_ids) <= CONTEXT - valid.max_tokens
    assert max(valid.prompt_ids) < WIDTH


def test_the_whole_message_is_valid() -> None:
    assert validate(pb.GenerateRequest.FromString(WHOLE), MODEL).next_index == 2
