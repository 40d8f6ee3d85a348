"""Small tokenizers made in code: byte-level BPE as in DeepSeek, Metaspace with byte fallback as in Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from cluster.gateway.tokenizer import Tokenizer

BOS = "<\uff5cbegin▁of▁sentence\uff5c>"
EOS = "<\uff5cend▁of▁sentence\uff5c>"
CONFIG: dict[str, Any] = {"bos_token": {"content": BOS, "lstrip": False}, "eos_token": EOS, "pad_token": None}
_MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "w"),
    ("Ġw", "o"),
    ("ð", "Ł"),
    ("Ã", "©"),
]


def byte_level_backend() -> tokenizers.Tokenizer:
    """256 bytes, a few merges, special tokens (BOS, EOS) and ordinary added ones (one with a space)."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in _MERGES)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=_MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(BOS), AddedToken(EOS)])
    backend.add_tokens([AddedToken("<think>"), AddedToken("<\uff5cUser\uff5c>"), AddedToken("a b")])
    return backend


def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), CONFIG, "tiny")


def metaspace() -> Tokenizer:
    """SentencePiece-like: words with a leading bar, byte tokens; the decoder strips one leading space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁a", "▁hello", "▁world", "a", "b", "o", ",", "é", "中"]
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, "tiny")


def plain_metaspace() -> Tokenizer:
    """The Metaspace decoder alone, without byte tokens."""
    pieces = ["<unk>", "▁", "▁a", "▁hello", "▁world", "a", "b", ","]
    backend = tokenizers.Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>"])
    return Tokenizer(backend, {}, "tiny")


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """The byte-level tokenizer as files; returns ``folder``."""
    byte_level_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
