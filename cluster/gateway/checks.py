"""What several fields of a request are checked for. Each raises InvalidRequest."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.gateway.errors import InvalidRequest


def check_range(field: str, value: float, least: float, most: float) -> None:
    """``value`` is from ``least`` to ``most``. NaN is not."""
    if not least <= value <= most:
        raise InvalidRequest(field, f"is {_shown(value)}; allowed is {least:g} to {most:g}")


def check_above(field: str, value: float, least: float, most: float) -> None:
    """The same without ``least`` itself."""
    if not least < value <= most:
        raise InvalidRequest(field, f"is {_shown(value)}; allowed is above {least:g} to {most:g}")


def check_ids(field: str, ids: Sequence[int], vocab_size: int, most: int | None = None) -> None:
    """Token ids that the model has a row for, no more than ``most`` of them."""
    if most is not None and len(ids) > most:
        raise InvalidRequest(field, f"has {len(ids)} ids; allowed are up to {most}")
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            raise InvalidRequest(f"{field}[{index}]", f"is token id {token_id}; allowed is 0 to {vocab_size - 1}")


def check_chars(field: str, chars: int, most: int) -> None:
    """A text of no more than ``most`` characters."""
    if chars > most:
        raise InvalidRequest(field, f"has {chars} characters; allowed are up to {most} for this model's context")


def refuse_nul(field: str, text: str) -> None:
    """A text without NUL."""
    if "\0" in text:
        raise InvalidRequest(field, f"has a NUL at character {text.index(chr(0))}; allowed is text without NUL")


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.7g}"  # what came as float32 has no more digits
