"""A checkpoint's tokenizer: its files read, checked, and put behind the few calls that serving needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """A checkpoint's tokenizer files are missing, broken, or contradict each other."""


class Tokenizer:
    """Text to token ids and back, for one checkpoint.

    The vocabulary may be smaller than the model's logits width (ids beyond it decode to nothing) or larger
    (the validator refuses the ids that the model has no row for).

    ``special_tokens`` maps roles (``bos_token``) to token texts; ``special_ids`` are left out of decoded text.
    ``byte_level``: every token is spelled in byte-level BPE's alphabet; ``byte_fallback``: the tokens
    ``<0x00>`` to ``<0xFF>`` are bytes. ``chat_template`` is the template as the files give it: a text, a list
    of named ones, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], source: str) -> None:
        """``config`` is the content of tokenizer_config.json; ``source`` names its folder in errors."""
        # A tokenizer.json may carry truncation and padding of its training run; a prompt is never cut here.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.source = source
        self.special_tokens = _special_tokens(config, source)
        self.chat_template: str | list[dict[str, str]] | None = config.get("chat_template")
        self.bos_id = self._mark_special("bos_token")
        self.eos_id = self._mark_special("eos_token")
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        kinds = _decoder_kinds(backend)
        if "ByteLevel" in kinds and len(kinds) > 1:
            raise TokenizerError(f"{source}: decoder is {kinds}; a ByteLevel decoder has to stand alone")
        self.byte_level = "ByteLevel" in kinds
        self.byte_fallback = "ByteFallback" in kinds

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json and tokenizer_config.json and, where they are, special_tokens_map.json and
        chat_template.jinja (which wins over a template in the config, as in Hugging Face transformers).

        Raises:
            TokenizerError: a file is missing or broken; it is named.
        """
        text = _read_text(folder / "tokenizer.json")  # first: of a folder with neither it is what is missing
        config = _read_object(folder / "tokenizer_config.json")
        legacy_map = folder / "special_tokens_map.json"
        if legacy_map.exists():
            config = {**_read_object(legacy_map), **config}
        template = folder / "chat_template.jinja"
        if template.exists():
            config["chat_template"] = _read_text(template)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from error
        return cls(backend, config, str(folder))

    @property
    def bos_token(self) -> str | None:
        """Text of the begin-of-sequence token, or None where the model has none."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the end-of-sequence token, or None where the model has none."""
        return self.special_tokens.get("eos_token")

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. Special tokens in it are recognised; none is added (templates write their
        own)."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens, and ids that the vocabulary does not have, leave nothing."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of one token, or None for a token that decodes to nothing whatever
        its neighbours are: a special one, or one that the vocabulary does not have."""
        return None if token_id in self.special_ids else self._backend.id_to_token(token_id)

    def special_piece(self, token_id: int) -> str | None:
        """The spelling of a special token, or None for any other id."""
        return self._backend.id_to_token(token_id) if token_id in self.special_ids else None

    def id_of(self, piece: str) -> int | None:
        """The id of a token by its own spelling, or None where the vocabulary does not have it."""
        return self._backend.token_to_id(piece)

    def _mark_special(self, role: str) -> int | None:
        """Id of the token of that role, after having it treated as special (some files forget to say so)."""
        token = self.special_tokens.get(role)
        if token is None:
            return None
        token_id = self.id_of(token)
        if token_id is None:
            raise TokenizerError(f"{self.source}: {role} is {token!r}, which is not in the vocabulary")
        known = self._backend.get_added_tokens_decoder().get(token_id)
        if known is None or not known.special:
            self._backend.add_special_tokens([token])
        return token_id


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[str]:
    """Types of the decoder's steps, as tokenizer.json names them."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]


def _special_tokens(config: dict[str, Any], source: str) -> dict[str, str]:
    """Role to text; a config writes each as a text, as an object with ``content``, or as null for none."""
    texts = {}
    for role in _SPECIAL_ROLES:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            continue
        if not isinstance(text, str) or not text:
            raise TokenizerError(f"{source}: {role} is {value!r}; allowed: a text, an object with content, or null")
        texts[role] = text
    return texts


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds a {type(value).__name__}; allowed is an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 at byte {error.start}") from error
