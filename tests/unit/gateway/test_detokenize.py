from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from cluster.gateway.detokenize import IncrementalDetokenizer
from cluster.gateway.tokenizer import Tokenizer, TokenizerError
from tests.unit.gateway.tiny_tokenizers import byte_level, metaspace, plain_metaspace

BYTE_LEVEL = byte_level()
METASPACE = metaspace()
PLAIN = plain_metaspace()
# The library's own spelling of each byte: what it cuts the UTF-8 of each character into, put in order.
_BYTE_ORDER = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_ORDER += [byte for byte in range(256) if byte not in _BYTE_ORDER]
_SPELLINGS = [*map(chr, _BYTE_ORDER[:188]), *map(chr, range(256, 324))]
BYTE_IDS = {byte: BYTE_LEVEL.id_of(spelling) or 0 for byte, spelling in zip(_BYTE_ORDER, _SPELLINGS, strict=True)}


def pieces_of(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    """One piece per token, and the flush."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.flush()]


def added_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The slow reference: the whole decoded, less the prompt's text (less its unfinished character)."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    if whole.startswith(before):
        return whole[len(before) :]
    assert before.endswith("\ufffd")
    assert whole.startswith(before[:-1])
    return whole[len(before) - 1 :]


def byte_ids(data: bytes) -> list[int]:
    """One byte-level token per byte."""
    return [BYTE_IDS[byte] for byte in data]


def fallback_ids(data: bytes) -> list[int]:
    """One SentencePiece byte token per byte."""
    ids = [METASPACE.id_of(f"<0x{byte:02X}>") for byte in data]
    assert None not in ids
    return [token_id for token_id in ids if token_id is not None]


def test_emoji_over_several_tokens_comes_whole() -> None:
    assert pieces_of(BYTE_LEVEL, [], byte_ids("a👍b".encode())) == ["a", "", "", "", "👍", "b", ""]


def test_tokens_that_end_inside_a_character() -> None:
    ids = BYTE_LEVEL.encode("🙂é🙂")
    assert len(ids) < len("🙂é🙂".encode())  # merges cross into the characters
    assert "".join(pieces_of(BYTE_LEVEL, BYTE_LEVEL.encode("x"), ids)) == "🙂é🙂"


def test_broken_bytes_are_replaced_as_soon_as_they_are_known_to_be_broken() -> None:
    assert pieces_of(BYTE_LEVEL, [], byte_ids(b"\xffa\xe2\x82b\xe2\x82")) == [
        *("\ufffd", "a", "", "", "\ufffdb", "", ""),
        "\ufffd",
    ]


def test_special_and_unknown_tokens_leave_nothing() -> None:
    assert BYTE_LEVEL.eos_id is not None
    ids = [*byte_ids(b"\xe2\x82"), BYTE_LEVEL.eos_id, 99_999, *byte_ids(b"\xac"), BYTE_LEVEL.eos_id]
    assert pieces_of(BYTE_LEVEL, [], ids) == ["", "", "", "", "€", "", ""]


def test_ordinary_added_tokens_are_text() -> None:
    ids = BYTE_LEVEL.encode("<think>a b<\uff5cUser\uff5c>")
    assert len(ids) == 3
    assert pieces_of(BYTE_LEVEL, [], ids) == ["<think>", "a b", "<\uff5cUser\uff5c>", ""]


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (b"\xac!", ["€", "!", ""]),  # completed: given whole
        (b"!", ["!", ""]),  # stayed broken: the U+FFFD is the prompt's
        (b"\xff", ["\ufffd", ""]),
        (b"", [""]),
    ],
)
@pytest.mark.parametrize("family", ["byte level", "metaspace"])
def test_prompt_that_ends_inside_a_character(family: str, generated: bytes, expected: list[str]) -> None:
    tokenizer, spell = (BYTE_LEVEL, byte_ids) if family == "byte level" else (METASPACE, fallback_ids)
    assert pieces_of(tokenizer, spell(b"x\xe2\x82"), spell(generated)) == expected


def test_prompt_that_ends_a_byte_before_the_end_of_an_emoji() -> None:
    first, last = "🙂".encode()[:3], "🙂".encode()[3:]
    assert pieces_of(BYTE_LEVEL, byte_ids(b"x" + first), byte_ids(last)) == ["🙂", ""]
    assert pieces_of(METASPACE, fallback_ids(b"x" + first), fallback_ids(last)) == ["🙂", ""]


class CountedPrompt(Sequence[int]):
    """A long prompt that counts how much of it is looked at."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self.looks = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.looks += 1
        return self._ids[index]

    def __len__(self) -> int:
        return len(self._ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["byte level", "metaspace"])
def test_only_the_end_of_the_prompt_is_looked_at(tokenizer: Tokenizer) -> None:
    prompt = CountedPrompt(tokenizer.encode("a") * 1000)
    assert IncrementalDetokenizer(tokenizer, prompt).push(tokenizer.encode("ab")[-1:]) == "b"
    assert prompt.looks < 30


def test_many_ids_in_one_push() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, [])
    assert detokenizer.push(byte_ids("hé".encode()[:2])) == "h"
    assert detokenizer.push(byte_ids("hé".encode()[2:] + b"llo")) == "éllo"
    assert detokenizer.push([]) == ""
    assert detokenizer.flush() == ""


CHUNKS = st.one_of(
    st.text(max_size=3).map(lambda text: text.encode()),
    st.binary(max_size=3),
    st.sampled_from([b"\xe2\x82", b"\xf0\x9f", b"\xed\xa0\x80", b"\xef\xbf", b"\xbd", b"\xc0\xaf", b"\xf4\x90"]),
)
BYTE_LEVEL_IDS = st.lists(
    st.one_of(
        CHUNKS.map(byte_ids),
        st.lists(st.integers(0, 275), max_size=2),
        st.text(max_size=4).map(BYTE_LEVEL.encode),
    ),
    max_size=12,
).map(lambda lists: [token_id for ids in lists for token_id in ids])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(prompt=BYTE_LEVEL_IDS, ids=BYTE_LEVEL_IDS)
def test_byte_level_pieces_join_to_the_text_of_the_whole(prompt: list[int], ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, prompt, ids)) == added_text(BYTE_LEVEL, prompt, ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=BYTE_LEVEL_IDS)
def test_what_was_sent_is_never_taken_back(ids: list[int]) -> None:
    sent = ""
    for count, piece in enumerate(pieces_of(BYTE_LEVEL, [], ids)[:-1], start=1):
        sent += piece
        whole = BYTE_LEVEL.decode(ids[:count])
        assert whole.startswith(sent)
        assert whole[len(sent) :] in ("", "\ufffd")  # at most one unfinished character lags behind


METASPACE_IDS = st.lists(
    st.one_of(
        st.text(max_size=3).map(lambda text: fallback_ids(text.encode())),
        st.integers(259, 269).map(lambda token_id: [token_id]),
        st.integers(0, 2).map(lambda token_id: [token_id]),
        st.just([5000]),
    ),
    max_size=8,
).map(lambda lists: [token_id for ids in lists for token_id in ids])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(prompt=METASPACE_IDS, ids=METASPACE_IDS)
def test_metaspace_pieces_join_to_the_text_of_the_whole(prompt: list[int], ids: list[int]) -> None:
    assert "".join(pieces_of(METASPACE, prompt, ids)) == added_text(METASPACE, prompt, ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompt=st.lists(st.integers(0, 8), max_size=5), ids=st.lists(st.integers(0, 8), max_size=8))
def test_plain_metaspace_pieces_join_to_the_text_of_the_whole(prompt: list[int], ids: list[int]) -> None:
    assert "".join(pieces_of(PLAIN, prompt, ids)) == added_text(PLAIN, prompt, ids)


def test_only_the_first_word_of_the_text_loses_its_space() -> None:
    hello, world = METASPACE.id_of("▁hello"), METASPACE.id_of("▁world")
    assert hello is not None
    assert world is not None
    assert pieces_of(METASPACE, [], [hello, world]) == ["hello", " world", ""]
    assert pieces_of(METASPACE, [hello], [world]) == [" world", ""]
    assert METASPACE.bos_id is not None
    assert pieces_of(METASPACE, [METASPACE.bos_id], [*fallback_ids("é".encode()), world]) == [
        "",
        "é",
        " world",
        "",
    ]


def test_a_broken_byte_run_keeps_its_sound_characters() -> None:
    ids = [*fallback_ids(b"\xff" + "é€".encode() + b"\xe2"), *[METASPACE.id_of("a") or 0]]
    assert pieces_of(METASPACE, [], ids) == ["\ufffd", "", "é", "", "", "€", "", "\ufffda", ""]


def test_byte_tokens_without_a_whole_alphabet_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<0xC3>": 0}, unk_token="<unk>"))
    backend.decoder = decoders.ByteFallback()
    with pytest.raises(TokenizerError, match="has byte tokens, but not <0x41>"):
        IncrementalDetokenizer(Tokenizer(backend, {}, "tiny"), []).push([0])


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["byte level", "metaspace"])
def test_a_token_costs_the_same_after_many(tokenizer: Tokenizer) -> None:
    """Decoding of everything again would make the second half of 20,000 tokens several times the first."""
    broken = BYTE_IDS[0xFF] if tokenizer.byte_level else fallback_ids(b"\xff")[0]
    prompt = [broken] * 100_000
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    spent = []
    for _ in range(4):
        start = time.process_time()
        for _ in range(5000):
            detokenizer.push([broken])
        spent.append(time.process_time() - start)
    assert min(spent[2:]) < 3 * max(spent[:2])


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert set(_SPELLINGS) == set(pre_tokenizers.ByteLevel.alphabet())
    for text in ("\x00\t\n \x7f\x80\xa0\xad\xff", "€🙂"):
        ids = byte_ids(text.encode())
        assert BYTE_LEVEL.decode(ids) == text
        assert "".join(pieces_of(BYTE_LEVEL, [], ids)) == text
