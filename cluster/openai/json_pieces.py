"""A large JSON text, written so that other threads can run meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

_ITEMS = 32
_PIECE_CHARS = 2**16

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_pieces(value: Any) -> Iterator[bytes]:
    """``value`` as JSON in UTF-8, in pieces of 64 Ki characters and some. It may have iterators where a list belongs.

    ``json.dumps`` keeps the interpreter's lock from the first byte to the last, some 20 ms a megabyte. Here no call is
    for more than 32 items of a list, or one text. Iterators leave the garbage collector, which holds the lock as well,
    nothing to go through.
    """
    waiting: list[str] = []
    size = 0
    for part in _parts(value):
        waiting.append(part)
        size += len(part)
        if size >= _PIECE_CHARS:
            yield "".join(waiting).encode()
            waiting, size = [], 0
    yield "".join(waiting).encode()


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for number, (key, item) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_encode(key)}:"
            yield from _parts(item)
        yield "}"
    elif isinstance(value, Iterator) or (isinstance(value, list) and len(value) > _ITEMS):
        items, opening = iter(value), "["
        while some := list(islice(items, _ITEMS)):
            yield opening + _encode(some)[1:-1]
            opening = ","
        yield "[]" if opening == "[" else "]"
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield "," if number else "["
            yield from _parts(item)
        yield "]"
    else:
        yield _encode(value)
