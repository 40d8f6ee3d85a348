from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from cluster.gateway.chat import ChatTemplate
from cluster.gateway.errors import Internal, InvalidRequest
from cluster.gateway.tokenizer import Tokenizer, TokenizerError
from tests.unit.gateway.tiny_tokenizers import BOS, CONFIG, EOS, byte_level_backend

BAR = "\uff5c"
USER, ASSISTANT = f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"
TOKENS = {"bos_token": BOS, "eos_token": EOS}
MAX_CHARS = 1000

# In the manner of DeepSeek-V3 and R1: system text right after BOS without a tag; earlier reasoning dropped.
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system='', first=true) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- if ns.first %}{% set ns.system = ns.system + message['content'] %}{% set ns.first = false %}"
    "{%- else %}{% set ns.system = ns.system + '\\n\\n' + message['content'] %}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% continue %}{%- endif %}"
    "{%- if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '" + ASSISTANT + "' + content.strip() + eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] == 'user' %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def say(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def render(source: str, *turns: tuple[str, str], max_chars: int = MAX_CHARS) -> str:
    return ChatTemplate(source, TOKENS).render(say(*(turns or [("user", "hi")])), max_chars)


def refusal(source: str, *turns: tuple[str, str], max_chars: int = MAX_CHARS) -> str:
    """The description of the error about the field `messages` that rendering has to end with."""
    with pytest.raises(InvalidRequest) as caught:
        render(source, *turns, max_chars=max_chars)
    assert caught.value.field == "messages"
    assert caught.value.__cause__ is None
    return caught.value.description


def test_deepseek_layout() -> None:
    text = render(
        DEEPSEEK,
        *(("system", "Be brief."), ("user", "1+1?"), ("assistant", "<think>sum</think>\n2 "), ("user", "Sure?")),
    )
    assert text == f"{BOS}Be brief.{USER}1+1?{ASSISTANT}2{EOS}{USER}Sure?{ASSISTANT}"
    assert render(DEEPSEEK, ("user", "x")) == f"{BOS}{USER}x{ASSISTANT}"
    assert render(DEEPSEEK, ("system", "a"), ("system", "b"), ("user", "x")).startswith(f"{BOS}a\n\nb{USER}")


def test_same_text_as_transformers() -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{%- if tools is not none %}tools{% endif %}\n"
        "{% for message in messages %}\n"
        "    {% if loop.index0 > 2 %}{% break %}{% endif %}\n"
        "    {%- set words = message.content.split() %}\n"
        '{{ message | tojson }}<{{ message.role.title() }}>{{ words | length }} & "é"\n'
        "{% generation %}{{ message.content | trim }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ messages | tojson(indent=2) }}{{ eos_token }}{{ unk_token }}\n"
    )
    messages = say(("system", "be é <b>"), ("user", " two words "), ("assistant", "ok"), ("user", "cut"))
    rendered, _ = transformers.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, **TOKENS
    )
    assert ChatTemplate(source, TOKENS).render(messages, MAX_CHARS) == rendered[0]


def test_blocks_are_trimmed_and_json_is_plain() -> None:
    source = "{% if true %}\nline\n  {% endif %}\n{{ messages[0] | tojson }}\n"
    assert render(source, ("user", "<é'&>")) == 'line\n{"role": "user", "content": "<é\'&>"}'


def test_the_clock_is_the_templates_only_other_input() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2024, 7, 26))
    assert template.render(say(("user", "hi")), MAX_CHARS) == "26 Jul 2024"


def test_a_template_that_refuses_is_quoted() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('Must begin with a user') }}{% endif %}"
    assert refusal(source, ("system", "x")) == "Must begin with a user"
    assert render(source) == ""


def test_a_refusal_that_quotes_the_conversation_is_not_passed_on() -> None:
    description = refusal("{{ raise_exception('bad: ' + messages[0].content) }}", ("user", "my secret"))
    assert description == "the model's chat template refuses this conversation"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
    ids=["undefined", "range", "dunder", "mutation", "subclasses"],
)
def test_what_the_sandbox_forbids_is_the_conversations_error(source: str) -> None:
    assert refusal(source) == "the model's chat template cannot render this conversation"


def test_a_fault_of_the_template_is_internal_and_quotes_nothing() -> None:
    with pytest.raises(Internal) as caught:
        render("line\n{{ messages[0].content | int(base=99) + (messages[0].content + 1) }}", ("user", "secret"))
    assert caught.value.detail == "chat template failed with TypeError at line 2"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_output_is_capped_while_it_is_made() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
    assert refusal(source, max_chars=50) == "render to more than 50 characters, the most for this model"
    assert render("{{ messages[0].content }}", ("user", "x" * 50), max_chars=50) == "x" * 50


def test_messages_of_the_caller_are_left_alone() -> None:
    messages = say(("user", "hi"))
    ChatTemplate("{% set m = messages[0] %}{{ m.content }}", {}).render(messages, MAX_CHARS)
    assert messages == say(("user", "hi"))


def test_a_broken_template_is_refused_at_load() -> None:
    with pytest.raises(TokenizerError, match="chat template, line 2:"):
        ChatTemplate("a\n{% if %}", {})


def chat_of(raw: Any) -> ChatTemplate | None:
    return ChatTemplate.of(Tokenizer(byte_level_backend(), {**CONFIG, "chat_template": raw}, "tiny"))


def test_the_default_of_several_templates_is_taken() -> None:
    both = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}D"}]
    chat = chat_of(both)
    assert chat is not None
    assert chat.render([], MAX_CHARS) == f"{BOS}D"
    with pytest.raises(TokenizerError, match=r"names \['tool_use'\]; one has to be 'default'"):
        chat_of(both[:1])


@pytest.mark.parametrize("raw", [7, [{"name": "default"}], ["x"]])
def test_a_template_of_another_shape_is_refused(raw: Any) -> None:
    with pytest.raises(TokenizerError, match="neither a text nor a list"):
        chat_of(raw)


def test_no_template_no_chat() -> None:
    assert chat_of(None) is None
