"""One token by itself, for whoever lists tokens: its text and its bytes."""

from __future__ import annotations

from functools import lru_cache

from cluster.gateway.detokenize import token_bytes
from cluster.gateway.tokenizer import Tokenizer


@lru_cache(maxsize=1 << 16)
def spelled(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes]:
    """The text of the token alone, and its bytes; both empty for an id that the vocabulary does not have.

    A special token is spelled out, though it leaves nothing in an answer. Of a token that is not whole characters the
    text has U+FFFD, as vLLM's; the bytes are its own, so that those of neighbours make up the character.
    """
    special = tokenizer.special_piece(token_id)
    if special is not None:
        return special, special.encode()
    text = tokenizer.decode([token_id])
    own = token_bytes(tokenizer, token_id)
    return text, text.encode() if own is None else own
