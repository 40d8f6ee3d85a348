"""The tokenizer inside a GGUF file, as the files Hugging Face libraries read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.default_model.errors import DefaultModelError

if TYPE_CHECKING:
    from cluster.default_model.gguf_llama import LlamaGguf


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """Byte-level BPE as GGUF keeps it: token texts by id, the ids of control tokens, merges as ``"left
    right"``."""

    tokens: list[str]
    control_ids: list[int]
    merges: list[str]
    bos_token_id: int
    eos_token_id: int
    unk_token_id: int
    pad_token_id: int
    max_length: int
    chat_template: str


def read_tokenizer(gguf: LlamaGguf) -> GgufTokenizer:
    """The file's tokenizer. Raises ``DefaultModelError`` unless it is SmolLM's kind of BPE."""
    from gguf import TokenType

    kind = (gguf.metadata("tokenizer.ggml.model"), gguf.metadata("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise DefaultModelError(f"tokenizer.ggml.model and .pre are {kind}, expected ('gpt2', 'smollm')")
    types = gguf.metadata("tokenizer.ggml.token_type")
    return GgufTokenizer(
        tokens=gguf.metadata("tokenizer.ggml.tokens"),
        control_ids=[index for index, kind in enumerate(types) if kind == TokenType.CONTROL],
        merges=gguf.metadata("tokenizer.ggml.merges"),
        bos_token_id=gguf.metadata("tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf.metadata("tokenizer.ggml.eos_token_id"),
        unk_token_id=gguf.metadata("tokenizer.ggml.unknown_token_id"),
        pad_token_id=gguf.metadata("tokenizer.ggml.padding_token_id"),
        max_length=gguf.config.max_positions,
        chat_template=gguf.metadata("tokenizer.chat_template"),
    )


def tokenizer_json(tokenizer: GgufTokenizer) -> dict[str, Any]:
    """``tokenizer.json`` for the ``tokenizers`` library.

    Splits are those of llama.cpp's pre-tokenizer "smollm": every digit alone, then GPT-2's pattern. There
    is no unknown token: bytes outside the vocabulary (a few control characters, private planes) are
    dropped.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, tokenizer.tokens[index]) for index in tokenizer.control_ids],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokenizer.tokens)},
            "merges": [merge.split(" ") for merge in tokenizer.merges],
        },
    }


def tokenizer_config(tokenizer: GgufTokenizer) -> dict[str, Any]:
    """``tokenizer_config.json``: named special tokens, the chat template and the longest input in tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokenizer.tokens[tokenizer.bos_token_id],
        "eos_token": tokenizer.tokens[tokenizer.eos_token_id],
        "unk_token": tokenizer.tokens[tokenizer.unk_token_id],
        "pad_token": tokenizer.tokens[tokenizer.pad_token_id],
        "additional_special_tokens": [tokenizer.tokens[index] for index in tokenizer.control_ids],
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.max_length,
        "chat_template": tokenizer.chat_template,
    }


def stop_token_ids(tokenizer: GgufTokenizer) -> list[int]:
    """Ids that end an answer: the end of a chat turn first, then the end of a text if that is another
    token."""
    ids = [tokenizer.eos_token_id]
    if "<|endoftext|>" in tokenizer.tokens:
        ids.append(tokenizer.tokens.index("<|endoftext|>"))
    return list(dict.fromkeys(ids))


def _added_token(index: int, content: str) -> dict[str, Any]:
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
