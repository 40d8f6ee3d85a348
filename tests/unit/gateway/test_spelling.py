"""Single tokens as text and as bytes."""

from __future__ import annotations

import pytest

from cluster.gateway.spelling import spelled
from cluster.gateway.tokenizer import Tokenizer
from tests.unit.gateway.tiny_tokenizers import EOS, byte_level, metaspace, plain_metaspace

BYTES, PIECES = byte_level(), metaspace()


@pytest.mark.parametrize(
    ("tokenizer", "piece", "text", "data"),
    [
        (BYTES, "hello", "hello", b"hello"),
        (BYTES, "Ġwo", " wo", b" wo"),
        (BYTES, "Ã©", "é", "é".encode()),
        (BYTES, "ðŁ", "\ufffd", b"\xf0\x9f"),
        (BYTES, EOS, EOS, EOS.encode()),
        (BYTES, "a b", "a b", b"a b"),
        (PIECES, "<0xC3>", "\ufffd", b"\xc3"),
        (PIECES, "é", "é", "é".encode()),
        (PIECES, "</s>", "</s>", b"</s>"),
        (plain_metaspace(), "b", "b", b"b"),
    ],
)
def test_a_token(tokenizer: Tokenizer, piece: str, text: str, data: bytes) -> None:
    token_id = tokenizer.id_of(piece)
    assert token_id is not None
    assert spelled(tokenizer, token_id) == (text, data)


def test_a_token_is_spelled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = byte_level(), []
    honest = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(ids) or honest(ids))
    assert spelled(tokenizer, 40) == spelled(tokenizer, 40) == spelled(BYTES, 40)
    assert decoded == [[40]]
    assert spelled.cache_info().maxsize is not None


def test_an_id_that_the_vocabulary_does_not_have_is_nothing() -> None:
    assert spelled(BYTES, 100_000) == ("", b"")


def test_the_bytes_of_a_characters_tokens_make_it_up() -> None:
    for text in ("👩 é", "中"):
        assert b"".join(spelled(BYTES, token_id)[1] for token_id in BYTES.encode(text)).decode() == text
