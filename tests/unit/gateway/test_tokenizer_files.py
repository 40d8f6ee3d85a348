from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import decoders

from cluster.gateway.tokenizer import Tokenizer, TokenizerError
from tests.unit.gateway.tiny_tokenizers import BOS, CONFIG, EOS, byte_level_backend, metaspace, write_checkpoint


def test_loads_a_checkpoint_folder(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_checkpoint(tmp_path, CONFIG))
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer.decode([tokenizer.bos_id]) == ""
    assert tokenizer.piece(tokenizer.eos_id) is None
    assert tokenizer.chat_template is None
    assert tokenizer.byte_level
    assert not tokenizer.byte_fallback


def test_encode_recognises_special_tokens_and_adds_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_checkpoint(tmp_path, CONFIG))
    ids = tokenizer.encode(f"{BOS}hello<think>")
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    assert [tokenizer.piece(i) for i in ids] == [None, "hello", "<think>"]
    assert tokenizer.encode("") == []
    assert tokenizer.decode(ids) == "hello<think>"


def test_a_post_processor_that_adds_tokens_adds_none() -> None:
    tokenizer = metaspace()
    assert tokenizer.encode("a") == [tokenizer.id_of("▁"), tokenizer.id_of("a")]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    write_checkpoint(tmp_path, CONFIG)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.encode("xyzxyzxyz")) == 9
    assert len(tokenizer.encode("x")) == 1


def test_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    tokenizer = metaspace()
    assert tokenizer.piece(100_000) is None
    assert tokenizer.decode([100_000]) == ""


def test_an_end_token_not_marked_special_is_special_all_the_same() -> None:
    tokenizer = Tokenizer(byte_level_backend(), {"eos_token": "<think>", "bos_token": "hello"}, "tiny")
    assert {tokenizer.eos_id, tokenizer.bos_id} <= tokenizer.special_ids
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.bos_id]) == ""


def test_legacy_special_tokens_map_fills_what_the_config_leaves_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"eos_token": EOS})
    legacy = {"bos_token": BOS, "eos_token": "<think>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(legacy), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)


def test_template_file_wins_over_the_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**CONFIG, "chat_template": "old"})
    assert Tokenizer.load(tmp_path).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("nové", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template == "nové"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / name).unlink()
    with pytest.raises(TokenizerError, match=rf"{name}: cannot be read: No such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", b"{", "not a tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "Unheard"}}', "not a tokenizer"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"[]", "holds a list; allowed is an object"),
        ("tokenizer_config.json", b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ("special_tokens_map.json", b"nope", "not JSON"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"{name}: {complaint}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"eos_token": "<nowhere>"}, "eos_token is '<nowhere>', which is not in the vocabulary"),
        ({"bos_token": 7}, "bos_token is 7; allowed"),
        ({"bos_token": ""}, "bos_token is ''; allowed"),
    ],
)
def test_contradictory_config_is_refused(config: dict[str, object], complaint: str) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer(byte_level_backend(), config, "tiny")


def test_a_byte_level_decoder_among_others_is_refused() -> None:
    backend = byte_level_backend()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    with pytest.raises(TokenizerError, match="has to stand alone"):
        Tokenizer(backend, CONFIG, "tiny")


def test_of_a_folder_without_a_tokenizer_its_main_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"/tokenizer\.json: cannot be read"):
        Tokenizer.load(tmp_path)
