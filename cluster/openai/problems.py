"""What pydantic found wrong with a client's body, in words that quote none of its texts. A field that is not known is
named, escaped and cut short: else nobody could find it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from cluster.gateway.errors import InvalidRequest

_BRANCHES = ("<text>", "<list>", "<ids>", "<texts>", "<lists>")
"""Of schema.py's unions: pydantic puts them into paths."""

_SHOWN_CHARS = 64

_ALLOWED_BY_TYPE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_unicode": "text without lone surrogates",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
_ALLOWED_BY_UNION = {
    "content": "a string or a list of text parts",
    "prompt": "a string, a list of token ids, or a list with one of these",
    "stop": "a string or a list of strings",
}
_ALLOWED_BY_BOUND: dict[str, Callable[[dict[str, Any]], str]] = {
    "greater_than_equal": lambda bound: f"{bound['ge']} or more",
    "less_than_equal": lambda bound: f"up to {bound['le']}",
    "literal_error": lambda bound: str(bound["expected"]).replace("'", '"'),
}


def invalid(error: ValidationError) -> InvalidRequest:
    """The first problem, with the path of its field."""
    first = error.errors(include_url=False)[0]
    return InvalidRequest(_path(first["loc"]), _description(first))


def shown(value: Any) -> str:
    """A number or a constant as JSON has it; of anything else what it is."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)[:_SHOWN_CHARS]
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _path(location: tuple[str | int, ...]) -> str:
    """As ``messages[0].content``. A client's own name is escaped."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in _BRANCHES:
            name = step.encode("ascii", "backslashreplace").decode()[:_SHOWN_CHARS]
            path += f".{name}" if path else name
    return path or "body"


def _description(error: Any) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return "is no parameter that is known here"
    if kind == "missing":
        return "is missing"
    if kind == "too_long":
        return f"has {len(error['input'])} entries; allowed are up to {error['ctx']['max_length']}"
    if kind in _ALLOWED_BY_BOUND:
        allowed = _ALLOWED_BY_BOUND[kind](error["ctx"])
    elif kind == "union_tag_not_found":
        allowed = _ALLOWED_BY_UNION[error["loc"][-1]]
    elif kind in _ALLOWED_BY_TYPE:
        allowed = _ALLOWED_BY_TYPE[kind]
    else:
        return str(error["msg"])  # one of schema.py's own
    return f"is {shown(error['input'])}; allowed is {allowed}"
