"""A checkpoint's chat template: a conversation in, the prompt's text out, rendered as Hugging Face
transformers does.

Templates come with the checkpoint, so from the operator; conversations come from anybody. The sandbox keeps
a template away from Python's internals, the caps keep a conversation from making it endless.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from cluster.gateway.errors import Internal, InvalidRequest
from cluster.gateway.tokenizer import Tokenizer, TokenizerError

_DEFAULT_NAME = "default"
_TEMPLATE_FILE = "<template>"
_FIELD = "messages"


class _Refused(jinja2.TemplateError):
    """The template itself called ``raise_exception``."""


class ChatTemplate:
    """Renders conversations for one model."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """``special_tokens`` become variables (``bos_token``); ``now`` is the clock behind ``strftime_now``.

        Raises:
            TokenizerError: the template is not valid Jinja.
        """
        self._source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"chat template, line {error.lineno}: {error.message}") from error

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that came with a tokenizer (of several, the one named "default"); None where none did.

        Raises:
            TokenizerError: the template is broken, or none of several is the default.
        """
        source = _pick(tokenizer.chat_template, tokenizer.source)
        return None if source is None else cls(source, tokenizer.special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], max_chars: int) -> str:
        """The prompt for ``messages`` (each with ``role`` and ``content``), up to where the assistant's
        answer begins.

        Raises:
            InvalidRequest: the template refuses the conversation, or the text passes ``max_chars`` characters.
            Internal: the template failed in a way of its own.
        """
        variables: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            # Templates ask `tools is not none`: absent must be none, not undefined.
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
        }
        try:
            return _joined(self._template.generate(variables), max_chars)
        except InvalidRequest:
            raise
        except _Refused as refusal:
            raise InvalidRequest(_FIELD, self._refusal_text(str(refusal))) from None
        except (jinja2.TemplateError, OverflowError):  # undefined value, sandbox, range() too long
            raise InvalidRequest(_FIELD, "the model's chat template cannot render this conversation") from None
        except Exception as error:
            # Not chained: a foreign error's message may quote the conversation, and this one goes to the log.
            raise Internal(f"chat template failed with {type(error).__name__} at line {_line(error)}") from None

    def _refusal_text(self, message: str) -> str:
        """The template's own words, unless it built them from the conversation, which errors never quote."""
        if message and message in self._source:
            return message
        return "the model's chat template refuses this conversation"


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration is a plain set)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment(now: Callable[[], datetime]) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it.

    Source: ``_cached_compile_jinja_template`` of huggingface/transformers, utils/chat_template_utils.py.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML, which a model would read literally."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _joined(pieces: Iterable[str], max_chars: int) -> str:
    kept: list[str] = []
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > max_chars:
            raise InvalidRequest(_FIELD, f"render to more than {max_chars} characters, the most for this model")
        kept.append(piece)
    return "".join(kept)


def _line(error: Exception) -> int | None:
    """Line of the template in which ``error`` arose; Jinja names its compiled frames after the template."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TEMPLATE_FILE]
    return lines[-1] if lines else None


def _pick(raw: str | list[dict[str, str]] | None, source: str) -> str | None:
    if raw is None or isinstance(raw, str):
        return raw
    if not isinstance(raw, list) or not all(
        isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in raw
    ):
        raise TokenizerError(f"{source}: chat_template is neither a text nor a list of {{name, template}}")
    named = {entry["name"]: entry["template"] for entry in raw}
    if _DEFAULT_NAME not in named:
        raise TokenizerError(f"{source}: chat_template names {sorted(named)}; one has to be {_DEFAULT_NAME!r}")
    return named[_DEFAULT_NAME]
