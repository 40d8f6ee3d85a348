"""JSON as clients send it, read more strictly than Python's reader does on its own."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from cluster.gateway.errors import InvalidRequest

_FIELD = "body"


def parse_json(data: bytes) -> Any:
    """The value in ``data``: one JSON text in UTF-8 (RFC 8259), no NaN or Infinity, no key twice in an object.

    Raises InvalidRequest for the field "body"; its text quotes nothing of ``data``.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise InvalidRequest(_FIELD, f"is not UTF-8 at byte {error.start}; allowed is JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            _FIELD, f"is not JSON: {error.msg[0].lower()}{error.msg[1:]} at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise InvalidRequest(_FIELD, "is nested too deeply") from None
    except ValueError:  # what is left: Python converts no more than some thousand digits
        raise InvalidRequest(_FIELD, "has a whole number of too many digits") from None


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(_FIELD, f"has {name}, which is not JSON; allowed are finite numbers")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InvalidRequest(_FIELD, "has an object with the same key twice; allowed is each key once")
    return found
