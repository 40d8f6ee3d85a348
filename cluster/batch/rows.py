"""The input: a file with one request a line, as OpenAI's batch API takes it. Read in a stream, never as a whole."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, BinaryIO

from cluster.batch.errors import BadInput
from cluster.gateway.errors import InvalidRequest
from cluster.openai.json_body import parse_json
from cluster.openai.requests import Endpoint

MAX_LINE_BYTES = 64 * 2**20
"""As much as a gateway takes in one message by default."""
MAX_CUSTOM_ID_CHARS = 512
MAX_PROBLEMS = 20

_KEYS = ("custom_id", "method", "url", "body")
_SHOWN_CHARS = 80


class BadRow(ValueError):
    """One line is no row; says what is wrong and what is allowed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request. ``body`` is checked only when it is sent: what is wrong in it is the row's own answer.

    ``digest`` tells lines apart: what was asked, under which id.
    """

    custom_id: str
    endpoint: Endpoint
    body: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class InputIdentity:
    """What makes an input the same one: ``size`` in bytes and the SHA-256 of its content. ``rows`` are in it."""

    rows: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Input:
    """An input that was checked. ``lines``: by ``key_of`` every row, the number of its line."""

    identity: InputIdentity
    lines: Mapping[bytes, int]

    @property
    def keys(self) -> Set[bytes]:
        """``key_of`` every row."""
        return self.lines.keys()


def key_of(custom_id: str) -> bytes:
    """16 bytes that stand for an id: a million of them fit into memory, however long the ids are."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def parse_row(line: bytes) -> Row:
    """One line without its end. Raises BadRow."""
    try:
        row = parse_json(line)
    except InvalidRequest as error:
        raise BadRow(error.description) from None
    if not isinstance(row, dict):
        raise BadRow(f"is a JSON {type(row).__name__}; allowed is an object with {', '.join(_KEYS)}")
    for key in (*_KEYS, *row):
        if key not in row:
            raise BadRow(f"{key}: is missing")
        if key not in _KEYS:
            raise BadRow(f"{_shown(key)}: unknown key; allowed are {', '.join(_KEYS)}")
    if row["method"] != "POST":
        raise BadRow(f"method: is {_shown(row['method'])}; allowed is POST")
    if row["url"] not in list(Endpoint):
        raise BadRow(f"url: is {_shown(row['url'])}; allowed are {', '.join(Endpoint)}")
    if not isinstance(row["body"], dict):
        raise BadRow(f"body: is a JSON {type(row['body']).__name__}; allowed is an object")
    digest = hashlib.sha256(line).hexdigest()[:32]
    return Row(_custom_id(row["custom_id"]), Endpoint(row["url"]), row["body"], digest)


def read_rows(file: BinaryIO, given: Input) -> Iterator[tuple[bytes, Row]]:
    """The rows of an input that was checked before, each with its key. Raises BadRow when they are not the same ones in
    the same lines any more; what else a line says is not compared."""
    count = 0
    for number, line in read_lines(file):
        if line is not None and line.strip():
            row = parse_row(line)
            key = key_of(row.custom_id)
            if given.lines.get(key) != number:
                raise BadRow(f"line {number}: custom_id: {_shown(row.custom_id)} was not there before")
            count += 1
            yield key, row
    if count != len(given.lines):
        raise BadRow(f"has {count} rows; had {len(given.lines)}")


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbers (from 1) and lines without their ends, from the start of the file; None for one that is too long."""
    file.seek(0)
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        whole = line if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n") else None
        while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
            whole = None
        if whole is not None and number == 1:
            whole = whole.removeprefix(codecs.BOM_UTF8)
        yield number, whole.rstrip(b"\r\n") if whole is not None else None


def check_input(name: str, file: BinaryIO) -> Input:
    """Look at every line before anything is sent. Raises BadInput with up to MAX_PROBLEMS of what is wrong."""
    digest, size = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(2**20):
        digest.update(chunk)
        size += len(chunk)
    first_lines: dict[bytes, int] = {}
    problems: list[str] = []
    for number, line in read_lines(file):
        try:
            _check_line(number, line, first_lines)
        except BadRow as error:
            problems.append(f"line {number}: {error}")
        if len(problems) == MAX_PROBLEMS:
            break
    if not problems and not first_lines:
        problems.append("it has no rows")
    if problems:
        raise BadInput(name, problems, len(problems) == MAX_PROBLEMS)
    return Input(InputIdentity(len(first_lines), size, digest.hexdigest()), first_lines)


def _check_line(number: int, line: bytes | None, first_lines: dict[bytes, int]) -> None:
    if line is None:
        raise BadRow(f"is too long; allowed are {MAX_LINE_BYTES} bytes")
    if line.strip():
        custom_id = parse_row(line).custom_id
        first = first_lines.setdefault(key_of(custom_id), number)
        if first != number:
            raise BadRow(f"custom_id: {_shown(custom_id)} is that of line {first}; each needs one of its own")


def _custom_id(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"custom_id: is {_shown(value)}; allowed is a string")
    if not 1 <= len(value) <= MAX_CUSTOM_ID_CHARS:
        raise BadRow(f"custom_id: has {len(value)} characters; allowed are 1 to {MAX_CUSTOM_ID_CHARS}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRow(f"custom_id: {_shown(value)} has half of a surrogate pair; allowed is Unicode text")
    return value


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
