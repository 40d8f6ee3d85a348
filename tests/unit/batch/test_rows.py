"""The input: what is a row, what is not, and that everything wrong is told before anything is sent."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import pytest

from cluster.batch import rows
from cluster.batch.errors import BadInput
from cluster.batch.rows import BadRow, check_input, key_of, parse_row, read_lines, read_rows
from cluster.openai.requests import Endpoint


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    row = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    row |= changes
    return json.dumps({key: value for key, value in row.items() if value is not ...}).encode()


def problems(data: bytes) -> list[str]:
    with pytest.raises(BadInput) as caught:
        check_input("in.jsonl", io.BytesIO(data))
    assert "in.jsonl: not a batch input; nothing was sent" in str(caught.value)
    return caught.value.problems


def test_a_row() -> None:
    row = parse_row(line("größe 1"))
    assert (row.custom_id, row.endpoint, row.body) == ("größe 1", Endpoint.COMPLETIONS, {"prompt": "x"})
    assert parse_row(line(url="/v1/chat/completions")).endpoint == Endpoint.CHAT
    assert parse_row(line("größe 1")).digest == row.digest
    assert parse_row(line("größe 1", body={"prompt": "y"})).digest != row.digest
    assert parse_row(line("x" * 512)).custom_id == "x" * 512


def test_a_body_is_the_rows_own_matter() -> None:
    assert parse_row(line(body={"prompt": 7, "unknown": None})).body == {"prompt": 7, "unknown": None}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"nope", "is not JSON"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (b"[]", "is a JSON list; allowed is an object"),
        (b'{"custom_id": NaN}', "NaN"),
        (b'{"a": 1, "a": 2}', "the same key twice"),
        (line(...), "custom_id: is missing"),
        (line(method=...), "method: is missing"),
        (line(body=...), "body: is missing"),
        (line(other=1), "'other': unknown key; allowed are custom_id, method, url, body"),
        (line(7), "custom_id: is 7; allowed is a string"),
        (line(""), "custom_id: has 0 characters; allowed are 1 to 512"),
        (line("x" * 513), "custom_id: has 513 characters"),
        (b'{"custom_id":"\\ud800","method":"POST","url":"/v1/completions","body":{}}', "half of a surrogate pair"),
        (line(method="GET"), "method: is 'GET'; allowed is POST"),
        (line(url="/v1/embeddings"), "url: is '/v1/embeddings'; allowed are /v1/chat/completions, /v1/completions"),
        (line(url=[]), "url: is []"),
        (line(body=[1]), "body: is a JSON list; allowed is an object"),
    ],
)
def test_what_is_no_row(data: bytes, words: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_row(data)
    assert words in str(caught.value)


def test_an_input_that_can_be_run() -> None:
    data = b"\xef\xbb\xbf" + line("a") + b"\r\n\n  \n" + line("b")
    given = check_input("in.jsonl", io.BytesIO(data))
    assert given.identity == rows.InputIdentity(2, len(data), hashlib.sha256(data).hexdigest())
    assert given.keys == {key_of("a"), key_of("b")}
    assert [row.custom_id for _, row in read_rows(io.BytesIO(data), given)] == ["a", "b"]


def test_all_problems_are_told_with_their_lines() -> None:
    told = problems(b"\n".join([line("a"), b"nope", b"", line("b", method="PUT"), line("a")]))
    assert [text.split(":")[0] for text in told] == ["line 2", "line 4", "line 5"]
    assert told[2] == "line 5: custom_id: 'a' is that of line 1; each needs one of its own"


def test_so_many_problems_are_enough() -> None:
    with pytest.raises(BadInput, match=r"the rest was not read") as caught:
        check_input("in.jsonl", io.BytesIO(b"nope\n" * 21))
    assert len(caught.value.problems) == rows.MAX_PROBLEMS


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_no_rows(data: bytes) -> None:
    assert problems(data) == ["it has no rows"]


def test_a_line_that_is_too_long_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 8)
    data = b"12345678\n" + b"123456789\n" + b"x" * 100 + b"\nend"
    assert list(read_lines(io.BytesIO(data))) == [(1, b"12345678"), (2, None), (3, None), (4, b"end")]
    assert "line 2: is too long; allowed are 8 bytes" in problems(data)
