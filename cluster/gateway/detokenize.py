"""Token ids to text while they arrive: every piece is final, no character is split.

``tokenizers.decoders.DecodeStream`` is not used: after a broken byte it withholds everything up to the next
sound character, decodes all of it again for each token (quadratic), and has no way to give the rest at the
end.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from cluster.gateway.tokenizer import Tokenizer, TokenizerError

_REPLACEMENT = "\ufffd"
_PROMPT_TAIL_TOKENS = 16
_START_TOKENS = 4
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_ANCHOR = "<0x41>"


class IncrementalDetokenizer:
    """The text that generated tokens add to a prompt, in pieces. Constant time per token.

    For byte-level tokenizers the pieces joined are ``decode(prompt + all)`` without ``decode(prompt)``. For
    SentencePiece-like ones they are too, as long as their byte tokens make sound UTF-8; of broken runs the
    sound characters are kept, where the library replaces the whole run. Special tokens leave nothing. U+FFFD
    appears once its bytes can no longer become a character, or at ``flush``. A character that the prompt
    begins and generated tokens complete is given whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._stream = _ByteStream(tokenizer) if tokenizer.byte_level else _WindowStream(tokenizer)
        # The state after the prompt depends on its last few tokens alone; their text is dropped.
        for token_id in _last_audible(tokenizer, prompt_ids):
            self._stream.push(token_id)
        self._prompt_cut = self._stream.unfinished()

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next token ids; returns the text that became complete, often empty."""
        return self._without_prompt("".join(map(self._stream.push, ids)))

    def flush(self) -> str:
        """The rest, once no token comes any more: an unfinished character as U+FFFD."""
        return self._without_prompt(self._stream.flush())

    def _without_prompt(self, text: str) -> str:
        """``text`` less the U+FFFD that stands for the prompt's own unfinished character, if it stayed so."""
        if text and self._prompt_cut:
            self._prompt_cut = False
            return text.removeprefix(_REPLACEMENT)
        return text


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """The bytes of one token that are the same whatever its neighbours are; None where those matter, or it has none."""
    piece = tokenizer.piece(token_id)
    if piece is None:
        return None
    if tokenizer.byte_level:
        return _piece_bytes(piece)
    byte = _BYTE_TOKEN.fullmatch(piece) if tokenizer.byte_fallback else None
    return None if byte is None else bytes.fromhex(byte[1])


class _ByteStream:
    """Byte-level BPE: a token is bytes, whatever its neighbours are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = _Utf8()

    def push(self, token_id: int) -> str:
        piece = self._tokenizer.piece(token_id)
        return "" if piece is None else self._utf8.push(_piece_bytes(piece))

    def flush(self) -> str:
        return self._utf8.flush()

    def unfinished(self) -> bool:
        return self._utf8.unfinished()


class _WindowStream:
    """Any other decoder: the library decodes each token after a context, whose text is taken off again.

    The context, tokens whose text is out already, tells the decoder that it is not at the start of the text,
    where it would strip a space. Byte tokens are decoded here: the library's text of a run of them
    changes with every one that is added.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = _Utf8()
        self._context: list[int] = []
        self._context_text = ""

    def push(self, token_id: int) -> str:
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        byte = _BYTE_TOKEN.fullmatch(piece) if self._tokenizer.byte_fallback else None
        if byte is not None:
            self._stand_after_bytes()
            return self._utf8.push(bytes.fromhex(byte[1]))
        return self._utf8.flush() + self._push_text(token_id)

    def flush(self) -> str:
        return self._utf8.flush()

    def unfinished(self) -> bool:
        return self._utf8.unfinished()

    def _push_text(self, token_id: int) -> str:
        whole = self._tokenizer.decode([*self._context, token_id])
        text = whole[len(self._context_text) :]
        alone = self._tokenizer.decode([token_id])
        if alone:
            self._context, self._context_text = [token_id], alone
        elif not self._context_text and not text:
            # Nothing but tokens that the decoder strips so far; it has to know that it stripped them.
            self._context = [*self._context, token_id][:_START_TOKENS]
        return text

    def _stand_after_bytes(self) -> None:
        """Makes the context a byte token that is a character by itself: after bytes no space is stripped."""
        anchor = self._tokenizer.id_of(_ANCHOR)
        if anchor is None:
            raise TokenizerError(f"{self._tokenizer.source}: has byte tokens, but not {_ANCHOR}")
        self._context, self._context_text = [anchor], self._tokenizer.decode([anchor])


class _Utf8:
    """Bytes to characters; broken sequences become U+FFFD as Unicode recommends, which is what Rust does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        text = self._decoder.decode(data)
        # CPython waits for a third byte after ED A0 to ED BF (surrogates), though no character begins so.
        if len(self._decoder.getstate()[0].decode("utf-8", "replace")) > 1:
            return text + self.flush()
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def unfinished(self) -> bool:
        return bool(self._decoder.getstate()[0])


def _last_audible(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The last tokens of ``ids`` that can have text, in order: they hold any unfinished character."""
    tail: list[int] = []
    for token_id in reversed(ids):
        if tokenizer.piece(token_id) is not None:
            tail.append(token_id)
        if len(tail) == _PROMPT_TAIL_TOKENS:
            break
    return tail[::-1]


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where printable, else one from U+0100
    on.

    Source: ``bytes_to_unicode`` of GPT-2 (openai/gpt-2, src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


@lru_cache(maxsize=1 << 16)
def _piece_bytes(piece: str) -> bytes:
    """Bytes of a byte-level token. One with a foreign character (an added token) stands for its own text."""
    if all(char in _BYTES for char in piece):
        return bytes(_BYTES[char] for char in piece)
    return piece.encode("utf-8")
