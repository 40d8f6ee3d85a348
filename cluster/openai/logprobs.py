"""Log-probabilities as OpenAI's two endpoints tell them, and those of the prompt as vLLM does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from expertmesh.v1 import inference_pb2 as pb

Json = dict[str, Any]
Spell = Callable[[int], tuple[str, bytes | None]]
"""A token's text, and its bytes where they are known."""
Listed = Callable[[Iterator[Json | None]], Any]
"""What becomes of a long list: ``list``, or the iterator itself for whoever takes it piece by piece."""


def spelled_as_id(token_id: int) -> tuple[str, None]:
    """For who has no tokenizer; as vLLM writes with ``return_tokens_as_token_ids``."""
    return f"token_id:{token_id}", None


def chat_logprobs(tokens: Iterable[pb.TokenLogprobs], spell: Spell, listed: Listed = list) -> Json:
    """``choice.logprobs`` of a chat, or of one of its chunks."""
    content = (
        {
            **_entry(token.token_id, token.logprob, spell),
            "top_logprobs": [_entry(top.token_id, top.logprob, spell) for top in token.top],
        }
        for token in tokens
    )
    return {"content": listed(content), "refusal": None}


def completion_logprobs(tokens: Iterable[pb.TokenLogprobs], spell: Spell, offset: int) -> Json:
    """``choice.logprobs`` of a text completion, or of one of its chunks.

    ``offset``: characters of the tokens before. As at OpenAI the drawn token is among the likeliest in any case; of
    tokens with the same text the likeliest is told.
    """
    told: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text, _ = spell(token.token_id)
        told["tokens"].append(text)
        told["token_logprobs"].append(token.logprob)
        told["top_logprobs"].append(_likeliest(token, spell))
        told["text_offset"].append(offset)
        offset += len(text)
    return told


def prompt_logprobs(tokens: Iterable[pb.TokenLogprobs], spell: Spell) -> Iterator[Json | None]:
    """One entry for each token of the prompt, by token id; null for the first, which nothing comes before."""
    yield None
    for token in tokens:
        yield _of_prompt(token, spell)


def _entry(token_id: int, logprob: float, spell: Spell) -> Json:
    text, data = spell(token_id)
    return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}


def _likeliest(token: pb.TokenLogprobs, spell: Spell) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in [*((top.token_id, top.logprob) for top in token.top), (token.token_id, token.logprob)]:
        found.setdefault(spell(token_id)[0], logprob)
    return found


def _of_prompt(token: pb.TokenLogprobs, spell: Spell) -> Json:
    ranked = [(token.token_id, token.logprob, token.rank)]
    ranked += [(top.token_id, top.logprob, rank) for rank, top in enumerate(token.top, 1)]
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": spell(token_id)[0]}
        for token_id, logprob, rank in ranked
    }
