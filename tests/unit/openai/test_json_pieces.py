"""Large JSON in pieces is the same JSON, and no call is for much of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.openai import json_pieces as module
from cluster.openai.json_pieces import json_pieces

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=70) | st.dictionaries(st.text(), inner), max_leaves=100
)


@given(VALUES)
def test_it_is_what_the_standard_library_writes(value: Any) -> None:
    assert b"".join(json_pieces(value)) == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 1000])
def test_an_iterator_is_a_list(count: int) -> None:
    text = b"".join(json_pieces({"a": [{"b": ({"n": n} for n in range(count))}], "c": 1}))
    assert json.loads(text) == {"a": [{"b": [{"n": n} for n in range(count)]}], "c": 1}


def test_no_call_and_no_piece_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, lengths = module._encode, []
    monkeypatch.setattr(module, "_encode", lambda value: lengths.append(len(honest(value))) or honest(value))
    pieces = list(json_pieces({"choices": [{"logprobs": [{"token": "x" * 90}] * 20_000}]}))
    assert max(lengths) < 4000
    assert len(lengths) < 700, "nor are there too many calls"
    assert {len(piece) // 2**16 for piece in pieces[:-1]} == {1}
    assert len(pieces) > 25


def test_what_is_no_number_in_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(json_pieces([float("nan")]))
