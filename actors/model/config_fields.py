"""Typed reads from a config.json, each with an error that names key, value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UnsupportedModelError

_REQUIRED: Any = object()


class Fields:
    """A view of a configuration. ``null`` counts as absent, as it does for transformers' defaults.

    Every method raises UnsupportedModelError for a value that is missing (without default) or not allowed.
    ``where`` prefixes the keys in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = values
        self._where = where

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        return self._values.get(key)

    def sub(self, key: str) -> Fields:
        """The object at ``key``, which must not hold further objects; empty if absent."""
        value = self.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
            raise self.error(key, "an object without objects inside (one setting for all layers)")
        return Fields(value, f"{self._where}{key}.")

    def integer(self, key: str, default: int = _REQUIRED, minimum: int = 1) -> int:
        """An integer >= minimum."""
        value = self._value(key, default, f"an integer >= {minimum}")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"an integer >= {minimum}")
        return value

    def optional_integer(self, key: str, minimum: int = 0) -> int | None:
        """An integer >= minimum, or None if absent."""
        return None if self.get(key) is None else self.integer(key, minimum=minimum)

    def number(self, key: str, default: float = _REQUIRED, above: float = 0.0) -> float:
        """A finite number > above."""
        value = self._value(key, default, f"a finite number > {above:g}")
        if not _is_finite(value) or value <= above:
            raise self.error(key, f"a finite number > {above:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number >= 0, or None if absent."""
        value = self.get(key)
        if value is not None and (not _is_finite(value) or value < 0):
            raise self.error(key, "a finite number >= 0")
        return None if value is None else float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def one_of(self, key: str, allowed: Sequence[str], default: str = _REQUIRED) -> str:
        """A string out of ``allowed``."""
        choices = "one of " + ", ".join(map(repr, allowed))
        value = self._value(key, default, choices)
        if value not in allowed:
            raise self.error(key, choices)
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """An integer or a list of integers >= 0; empty if absent."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(key, "an integer >= 0 or a list of them")
        return tuple(ids)

    def require(self, holds: bool, key: str, allowed: str) -> None:
        """Raise for ``key`` unless ``holds``."""
        if not holds:
            raise self.error(key, allowed)

    def error(self, key: str, allowed: str) -> UnsupportedModelError:
        """The error for the value at ``key``."""
        if key not in self._values:
            return UnsupportedModelError(f"{self._where}{key} is missing: allowed is {allowed}")
        return UnsupportedModelError(f"{self._where}{key} is {self._values[key]!r}: allowed is {allowed}")

    def _value(self, key: str, default: Any, allowed: str) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(key, allowed)
        return default


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
