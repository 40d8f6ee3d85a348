"""What an OpenAI body becomes, and what is said of one that cannot be served."""

from __future__ import annotations

import json
from typing import Any

import pytest
from expertmesh.v1 import inference_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.gateway.errors import InvalidRequest
from cluster.openai.requests import Endpoint, Parsed, parse_json, parse_request
from cluster.openai.schema import ChatBody, CompletionBody

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
PART = {"type": "text", "text": ""}


def chat(**fields: Any) -> Parsed:
    return parse_request(Endpoint.CHAT, {**CHAT, **fields})


def completion(**fields: Any) -> Parsed:
    return parse_request(Endpoint.COMPLETIONS, {**TEXT, **fields})


def refused(endpoint: Endpoint, body: Any) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(endpoint, body)
    return caught.value.field, caught.value.description


def test_every_parameter_finds_its_place() -> None:
    parsed = completion(
        model="m",
        max_tokens=7,
        temperature=1,
        top_p=0.5,
        top_k=40,
        seed=3,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
        user="somebody",
        n=3,
        logprobs=2,
        min_p=0.25,
        min_tokens=4,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={"7": -100, "9": 1.5},
        allowed_token_ids=[7, 9],
        priority="batch",
        best_of=3,
    )
    assert parsed.message == pb.GenerateRequest(
        model="m",
        prompt="hi",
        sampling=pb.SamplingParameters(
            temperature=1,
            top_p=0.5,
            top_k=40,
            seed=3,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
            logit_bias={7: -100, 9: 1.5},
            allowed_token_ids=[7, 9],
        ),
        stopping=pb.StoppingParameters(
            max_tokens=7, min_tokens=4, stop=["a", "b"], stop_token_ids=[1, 2], ignore_eos=True
        ),
        n=3,
        logprobs=2,
        priority=pb.PRIORITY_BATCH,
    )
    assert (parsed.stream, parsed.include_usage) == (True, True)


@pytest.mark.parametrize("fields", [{}, {"temperature": None, "seed": None, "stop": None, "stream": None, "n": None}])
def test_what_is_left_out_or_null_takes_the_models_defaults(fields: dict[str, Any]) -> None:
    parsed = chat(**fields)
    for name in ("temperature", "top_p", "top_k", "seed"):
        assert not parsed.message.sampling.HasField(name)
    assert not parsed.message.stopping.HasField("max_tokens")
    assert not parsed.message.model
    assert (parsed.stream, parsed.include_usage) == (False, False)


def test_a_text_completion_has_sixteen_tokens_unless_asked_otherwise() -> None:
    assert completion().message.stopping.max_tokens == 16
    assert completion(max_tokens=None).message.stopping.max_tokens == 16
    assert completion(max_tokens=1).message.stopping.max_tokens == 1
    assert completion().default_max_tokens
    assert not completion(max_tokens=16).default_max_tokens
    assert not chat().default_max_tokens


def test_messages() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    parsed = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []},
        ]
    )
    found = [(message.role, message.content) for message in parsed.message.messages.messages]
    assert found == [("system", "be brief"), ("user", "one\ntwo"), ("assistant", "yes")]


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [("a", "a", None), (["a"], "a", None), ([1, 2], None, [1, 2]), ([[1, 2]], None, [1, 2]), ([], None, [])],
)
def test_a_prompt_in_each_of_its_forms(prompt: Any, text: str | None, ids: list[int] | None) -> None:
    message = completion(prompt=prompt).message
    if ids is None:
        assert (message.WhichOneof("input"), message.prompt) == ("prompt", text)
    else:
        assert (message.WhichOneof("input"), list(message.token_ids.ids)) == ("token_ids", ids)


def test_either_name_of_the_token_limit() -> None:
    assert chat(max_tokens=5).message.stopping.max_tokens == 5
    assert chat(max_completion_tokens=6).message.stopping.max_tokens == 6
    both = {**CHAT, "max_tokens": 5, "max_completion_tokens": 5}
    assert refused(Endpoint.CHAT, both)[0] == "max_tokens"


def test_a_negative_seed_keeps_its_bits_and_top_k_may_be_all() -> None:
    assert chat(seed=-1).message.sampling.seed == 2**64 - 1
    assert chat(seed=2**64 - 1).message.sampling.seed == 2**64 - 1
    assert chat(top_k=-1).message.sampling.top_k == 0


def test_log_probabilities_of_both_endpoints_and_of_the_prompt() -> None:
    assert not chat(logprobs=False, top_logprobs=0).message.HasField("logprobs")
    assert chat(logprobs=True).message.logprobs == 0
    assert chat(logprobs=True).message.HasField("logprobs")
    assert chat(logprobs=True, top_logprobs=5).message.logprobs == 5
    assert not completion(logprobs=None).message.HasField("logprobs")
    assert completion(logprobs=0).message.HasField("logprobs")
    assert chat(prompt_logprobs=0).message.HasField("prompt_logprobs")
    assert completion(prompt_logprobs=3).message.prompt_logprobs == 3


def test_which_come_first() -> None:
    assert chat().message.priority == pb.PRIORITY_UNSPECIFIED
    assert chat(priority="interactive").message.priority == pb.PRIORITY_INTERACTIVE
    assert chat(priority="batch").message.priority == pb.PRIORITY_BATCH


NEUTRAL: list[dict[str, Any]] = [
    {"logit_bias": {}, "logprobs": False, "top_logprobs": 0, "allowed_token_ids": []},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "auto"},
    {"response_format": {"type": "text"}, "modalities": ["text"], "store": False, "metadata": {"a": "b"}},
    {"service_tier": "auto", "reasoning_effort": "none"},
]


@pytest.mark.parametrize("fields", NEUTRAL)
def test_neutral_values_change_nothing(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "low"),
        ("store", True),
        ("web_search_options", {}),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field: str, value: Any) -> None:
    name, description = refused(Endpoint.CHAT, {**CHAT, field: value})
    assert name == field
    assert description.startswith("is not supported here; allowed is ")


@pytest.mark.parametrize(("field", "value"), [("best_of", 2), ("echo", True), ("suffix", "x")])
def test_so_it_is_with_text_completions(field: str, value: Any) -> None:
    assert refused(Endpoint.COMPLETIONS, {**TEXT, field: value})[0] == field


@pytest.mark.parametrize(
    ("fields", "field", "description"),
    [
        ({"max_tokens": 0}, "max_tokens", "is 0; allowed is 1 or more"),
        ({"max_tokens": True}, "max_tokens", "is true; allowed is a whole number"),
        ({"max_tokens": 1.5}, "max_tokens", "is 1.5; allowed is a whole number"),
        ({"max_tokens": "1"}, "max_tokens", "is a string; allowed is a whole number"),
        ({"max_tokens": 2**32}, "max_tokens", "is 4294967296; allowed is up to 4294967295"),
        ({"temperature": True}, "temperature", "is true; allowed is a number"),
        ({"temperature": float("inf")}, "temperature", "is inf; allowed is a finite number"),
        ({"seed": 2**64}, "seed", f"is {2**64}; allowed is up to {2**64 - 1}"),
        ({"seed": -(2**63) - 1}, "seed", f"is {-(2**63) - 1}; allowed is {-(2**63)} or more"),
        ({"stop": 3}, "stop", "is 3; allowed is a string or a list of strings"),
        ({"stop": ["a", 3]}, "stop[1]", "is 3; allowed is a string"),
        ({"stop": "\ud800"}, "stop", "has a lone surrogate; allowed is Unicode text"),
        ({"stream": 1}, "stream", "is 1; allowed is true or false"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]", "is -1; allowed is 0 or more"),
        ({"stream_options": {}}, "stream_options", "is given without stream; allowed is with stream true"),
        ({"n": 0}, "n", "is 0; allowed is 1 to 16"),
        ({"n": True}, "n", "is true; allowed is a whole number"),
        ({"min_p": "a"}, "min_p", "is a string; allowed is a number"),
        ({"presence_penalty": float("inf")}, "presence_penalty", "is inf; allowed is a finite number"),
        ({"logprobs": 1}, "logprobs", "is 1; allowed is true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "is 2 without logprobs; allowed is with logprobs true"),
        ({"logit_bias": []}, "logit_bias", "is a list; allowed is an object"),
        ({"logit_bias": {"x": 1}}, "logit_bias", 'has a key that is no token id; allowed are whole numbers, as "17"'),
        (
            {"logit_bias": {"4294967296": 1}},
            "logit_bias",
            'has a key that is no token id; allowed are whole numbers, as "17"',
        ),
        ({"logit_bias": {"07": 1}}, "logit_bias", 'has a key that is no token id; allowed are whole numbers, as "17"'),
        ({"logit_bias": {"6": 1, "7": 101}}, "logit_bias", "has 101 for 7; allowed is -100 to 100"),
        ({"logit_bias": {"7": True}}, "logit_bias", "has true for 7; allowed is -100 to 100"),
        ({"logit_bias": {"7": float("nan")}}, "logit_bias", "has nan for 7; allowed is -100 to 100"),
        ({"priority": 1}, "priority", 'is 1; allowed is "interactive" or "batch"'),
        (
            {"stream": True, "prompt_logprobs": 1},
            "prompt_logprobs",
            "is given with stream; allowed is without: a stream has no place for them",
        ),
        ({"no_such_thing": 1}, "no_such_thing", "is no parameter that is known here"),
        ({"<text>": 1, "<x": 1}, "body", "is no parameter that is known here"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], field: str, description: str) -> None:
    assert refused(Endpoint.CHAT, {**CHAT, **fields}) == (field, description)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (None, "messages"),
        ({}, "messages"),
        ([3], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "x", "name": "bob"}], "messages[0].name"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].tool_call_id"),
    ],
)
def test_bad_messages_are_named(messages: Any, field: str) -> None:
    assert refused(Endpoint.CHAT, {"messages": messages})[0] == field


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (None, "prompt"),
        (3, "prompt"),
        (["a", "b"], "prompt"),
        ([[1], [2]], "prompt"),
        ([1, "a"], "prompt[1]"),
        ([1, 2**32], "prompt[1]"),
        ([True], "prompt[0]"),
        ([[1, -1]], "prompt[0][1]"),
    ],
)
def test_bad_prompts_are_named(prompt: Any, field: str) -> None:
    assert refused(Endpoint.COMPLETIONS, {"prompt": prompt})[0] == field


MANY = 100_000
FIELDS_WITHOUT_END = dict.fromkeys(map(str, range(MANY)))
BOMBS: list[tuple[Endpoint, dict[str, Any], str]] = [
    (Endpoint.CHAT, {"messages": [{}] * MANY}, "messages[0].role"),
    (Endpoint.CHAT, {"messages": CHAT["messages"] * MANY}, "messages"),
    (Endpoint.CHAT, {"messages": [FIELDS_WITHOUT_END]}, "messages[0]"),
    (Endpoint.CHAT, {"messages": [{"role": "user", "content": [{}] * MANY}]}, "messages[0].content[0].type"),
    (Endpoint.CHAT, {"messages": [{"role": "user", "content": [PART] * MANY}]}, "messages[0].content"),
    (
        Endpoint.CHAT,
        {"messages": [{"role": "user", "content": [FIELDS_WITHOUT_END]}]},
        "messages[0].content[0]",
    ),
    (Endpoint.CHAT, {**CHAT, **FIELDS_WITHOUT_END}, "body"),
    (Endpoint.CHAT, {**CHAT, "metadata": FIELDS_WITHOUT_END}, "metadata"),
    (Endpoint.CHAT, {**CHAT, "stream_options": FIELDS_WITHOUT_END}, "stream_options"),
    (Endpoint.CHAT, {**CHAT, "logit_bias": FIELDS_WITHOUT_END}, "logit_bias"),
    (Endpoint.CHAT, {**CHAT, "logit_bias": dict.fromkeys(map(str, range(1024)))}, "logit_bias"),
    (Endpoint.CHAT, {**CHAT, "allowed_token_ids": [1] * MANY}, "allowed_token_ids"),
    (Endpoint.CHAT, {**CHAT, "stop": [1] * MANY}, "stop[0]"),
    (Endpoint.CHAT, {**CHAT, "stop": ["a"] * MANY}, "stop"),
    (Endpoint.CHAT, {**CHAT, "stop_token_ids": [-1] * MANY}, "stop_token_ids[0]"),
    (Endpoint.CHAT, {**CHAT, "stop_token_ids": [1] * MANY}, "stop_token_ids"),
    (Endpoint.COMPLETIONS, {"prompt": [-1] * MANY}, "prompt[0]"),
    (Endpoint.COMPLETIONS, {"prompt": [1, *[""] * MANY]}, "prompt[1]"),
    (Endpoint.COMPLETIONS, {"prompt": ["", *[1] * MANY]}, "prompt"),
    (Endpoint.COMPLETIONS, {"prompt": [[-1] * MANY]}, "prompt[0][0]"),
    (Endpoint.COMPLETIONS, {"prompt": [[], *[1] * MANY]}, "prompt"),
]


@pytest.mark.parametrize(("endpoint", "body", "field"), BOMBS, ids=[field for *_, field in BOMBS])
def test_a_body_full_of_errors_costs_a_few(endpoint: Endpoint, body: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        (ChatBody if endpoint == Endpoint.CHAT else CompletionBody).model_validate(body)
    assert caught.value.error_count() <= 2
    assert refused(endpoint, body)[0] == field


def test_too_many_entries_are_counted() -> None:
    ids = {**CHAT, "stop_token_ids": [1] * 17}
    assert refused(Endpoint.CHAT, ids) == ("stop_token_ids", "has 17 entries; allowed are up to 16")
    many = {**CHAT, **dict.fromkeys(map(str, range(200)))}
    assert refused(Endpoint.CHAT, many) == ("body", "has 201 fields; allowed are up to 128")
    assert len(chat(stop=["a"] * 16, stop_token_ids=[1] * 16).message.stopping.stop) == 16


def test_no_text_of_the_client_is_quoted() -> None:
    secret = "the client's words"
    for body in (
        {"messages": secret},
        {"messages": [{"role": "user", "content": [{"type": secret, "text": secret}]}]},
        {**CHAT, "max_tokens": secret},
        {**CHAT, "tools": [secret]},
        {**CHAT, "response_format": {"type": secret}},
    ):
        assert secret not in " ".join(refused(Endpoint.CHAT, body))


@pytest.mark.parametrize(
    ("parsed", "path", "param"),
    [
        (chat(), "sampling.temperature", "temperature"),
        (chat(), "stopping.stop[2]", "stop[2]"),
        (chat(stop="a"), "stopping.stop[0]", "stop"),
        (chat(stop=["a"]), "stopping.stop[0]", "stop[0]"),
        (chat(max_tokens=1), "stopping.max_tokens", "max_tokens"),
        (chat(max_completion_tokens=1), "stopping.max_tokens", "max_completion_tokens"),
        (chat(), "messages.messages[0].role", "messages[0].role"),
        (chat(), "messages", "messages"),
        (chat(logprobs=True, top_logprobs=20), "logprobs", "top_logprobs"),
        (chat(prompt_logprobs=3), "prompt_logprobs", "prompt_logprobs"),
        (completion(logprobs=3), "logprobs", "logprobs"),
        (completion(n=3), "n", "n"),
        (chat(), "sampling.allowed_token_ids[3]", "allowed_token_ids[3]"),
        (chat(), "sampling.logit_bias[7]", "logit_bias[7]"),
        (chat(), "stopping.min_tokens", "min_tokens"),
        (completion(), "prompt", "prompt"),
        (completion(prompt=["a"]), "prompt", "prompt[0]"),
        (completion(prompt=[1]), "token_ids.ids[3]", "prompt[3]"),
        (completion(prompt=[[1]]), "token_ids.ids[3]", "prompt[0][3]"),
        (completion(), "model", "model"),
    ],
)
def test_the_validators_paths_become_the_clients_names(parsed: Parsed, path: str, param: str) -> None:
    assert parsed.param(path) == param


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON"),
        (b'{"a": }', "line 1 column 7"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b'{"a": NaN}', "has NaN"),
        (b"[-Infinity]", "has -Infinity"),
        (b'{"a": 1, "a": 2}', "the same key twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 10_000, "too many digits"),
    ],
)
def test_what_is_not_json_is_told(data: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_json(data)
    assert caught.value.field == "body"


FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": JSON, "content": JSON}), max_size=3)
BODIES = st.fixed_dictionaries(
    {}, optional={"messages": MESSAGES, "prompt": JSON, **dict.fromkeys(["stop", "seed", "model", "user"], JSON)}
)
ANY_BODIES = JSON | BODIES | st.dictionaries(st.sampled_from(FIELDS) | st.text(st.characters()), JSON, max_size=5)


def outcome(endpoint: Endpoint, data: bytes) -> Parsed | InvalidRequest:
    try:
        return parse_request(endpoint, parse_json(data))
    except InvalidRequest as error:
        return error


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(Endpoint), ANY_BODIES)
def test_any_json_is_parsed_or_refused(endpoint: Endpoint, body: Any) -> None:
    found = outcome(endpoint, json.dumps(body).replace("Infinity", "1e999").encode())
    if isinstance(found, InvalidRequest):
        assert found.field.isascii()
        assert str(found).encode()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=64))
def test_any_bytes_are_refused(data: bytes) -> None:
    found = outcome(Endpoint.CHAT, data)
    assert isinstance(found, InvalidRequest)
    assert found.field == "body"
