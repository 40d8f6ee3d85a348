"""The tokenizer files against a slow, obvious byte-level BPE over the GGUF's own vocabulary and merges."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]

from cluster.default_model.gguf_llama import LlamaGguf
from cluster.default_model.gguf_tokenizer import GgufTokenizer, read_tokenizer, stop_token_ids
from cluster.default_model.source import find_gguf
from tests.prompts import PROMPTS

TEXTS = [
    "Hello world",
    "In 2024, 3.14159 × 10²³ is 1,000,000 times ½ of Ⅻ or ٣٤.",
    "naïve café – „Grüße“ … ¿qué?",
    "日本語と한국어 и русский язык",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 end",
    "  leading, trailing\t\ttabs \n\n\r\n and   runs   ",
    "def f(x):\n    return {'a': x**2}  # don't, we'll, I'M",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start |> <repo_name>x",
    "",
]


@pytest.fixture(scope="module")
def stored() -> GgufTokenizer:
    return read_tokenizer(LlamaGguf(find_gguf()))


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


def reference_ids(stored: GgufTokenizer, text: str) -> list[int]:
    ids = {token: index for index, token in enumerate(stored.tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(stored.merges)}
    letters = byte_letters()
    special = regex.compile("|".join(regex.escape(stored.tokens[index]) for index in stored.control_ids))
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    result = []
    for piece in regex.split(f"({special.pattern})", text):
        if special.fullmatch(piece):
            result.append(ids[piece])
            continue
        for part in regex.split(r"(\p{N})", piece):
            for word in words.findall(part):
                result += [ids[t] for t in merge_all([letters[b] for b in word.encode()], ranks)]
    return result


def merge_all(symbols: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    while True:
        pairs = [pair for pair in itertools.pairwise(symbols) if pair in ranks]
        if not pairs:
            return symbols
        left, right = min(pairs, key=lambda pair: ranks[pair])
        merged, at = [], 0
        while at < len(symbols):
            if symbols[at : at + 2] == [left, right]:
                merged.append(left + right)
                at += 2
            else:
                merged.append(symbols[at])
                at += 1
        symbols = merged


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_vocabulary_and_come_back(tokenizer: Any, stored: GgufTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == reference_ids(stored, text)
    assert tokenizer.decode(ids) == text


def test_prompts_match_the_reference(tokenizer: Any, stored: GgufTokenizer) -> None:
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        assert ids == reference_ids(stored, prompt)
        assert tokenizer.decode(ids) == prompt


def test_every_digit_stands_alone(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("2024")) == ["2", "0", "2", "4"]


def test_bytes_without_a_token_are_dropped(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


def test_special_tokens(tokenizer: Any, stored: GgufTokenizer) -> None:
    assert stored.control_ids == list(range(17))
    assert sorted(tokenizer.all_special_ids) == list(range(17))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192


def test_chat_template(tokenizer: Any, model_dir: Path) -> None:
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (model_dir / "chat_template.jinja").read_text()


def test_stop_ids_are_the_same_everywhere(stored: GgufTokenizer, model_dir: Path) -> None:
    assert stop_token_ids(stored) == [2, 0]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((model_dir / name).read_text())["eos_token_id"] == [2, 0]
