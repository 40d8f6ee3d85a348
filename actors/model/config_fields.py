"""Typed reads from a config.json, each with an error that names key, value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .errors import UnsupportedModelError

MAXIMUM = 2**31 - 1
"""Of any integer."""
LARGEST = {
    "num_hidden_layers": 10_000,
    "n_routed_experts": 100_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "max_position_embeddings": 2**24,
}
"""Of what is counted out in memory: more is a slip of the pen that would exhaust it."""

_REQUIRED: Any = object()
_SHOWN = 120


class Fields:
    """A view of a configuration. It remembers which keys were asked for.

    ``defaults`` stand for keys that are absent; a key that is ``null`` has no value, whatever its default, as in
    transformers. A method's own ``default`` stands for what has no value then. Every method raises
    UnsupportedModelError for a value that is missing (without default) or not allowed. ``where`` prefixes the keys in
    messages.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str = "", defaults: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._values = values
        self._defaults = defaults
        self._where = where
        self._asked: set[str] = set()

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        self._asked.add(key)
        return self._values[key] if key in self._values else self._defaults.get(key)

    def ignore(self, *keys: str) -> None:
        """Whatever they hold has no effect here, and is not refused for that."""
        self._asked.update(keys)

    def synonym(self, *keys: str) -> str:
        """The one of ``keys``, all names of the same thing, that has a value; the first if none has."""
        stated = [key for key in keys if self.get(key) is not None] or [keys[0]]
        for other in stated[1:]:
            same = f"{shown(self.get(stated[0]))}, as {stated[0]} says"
            self.require(self.get(other) == self.get(stated[0]), other, same)
        return stated[0]

    def refuse_unasked(self, neutral: Mapping[str, Any]) -> None:
        """Raise for a key of ``neutral`` that nobody asked for and that holds another value than the one there."""
        for key, value in neutral.items():
            if key not in self._asked and self._values.get(key) not in (None, value):
                raise self.error(key, f"{shown(value)} (this model_type has no such thing)")

    def sub(self, key: str) -> Fields:
        """The object at ``key``, which must not hold further objects; empty if absent."""
        value = self.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
            raise self.error(key, "an object without objects inside (one setting for all layers)")
        return Fields(value, f"{self._where}{key}.")

    def integer(self, key: str, default: int = _REQUIRED, minimum: int = 1) -> int:
        """An integer from ``minimum`` to the largest that ``key`` may be (see LARGEST)."""
        value = self._value(key, default, f"an integer >= {minimum}")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"an integer >= {minimum}")
        if value > LARGEST.get(key, MAXIMUM):
            raise self.error(key, f"an integer <= {LARGEST.get(key, MAXIMUM)}")
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
        """true or false; ``null`` is false, as in transformers, whatever the default."""
        if key in self._values and self.get(key) is None:
            return False
        value = self._value(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def one_of(self, key: str, allowed: Sequence[str], default: str = _REQUIRED) -> str:
        """A string out of ``allowed``."""
        choices = _one_of(allowed)
        value = self._value(key, default, choices)
        if value not in allowed:
            raise self.error(key, choices)
        return value

    def list_of(self, key: str, allowed: Sequence[str], length: int) -> tuple[str, ...] | None:
        """``length`` strings out of ``allowed``, or None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or any(entry not in allowed for entry in value):
            raise self.error(key, f"a list of {length}, each {_one_of(allowed)}")
        return tuple(value)

    def indices(self, key: str) -> frozenset[int]:
        """A list of integers >= 0; empty if absent."""
        value = self.get(key)
        if value is None:
            return frozenset()
        if not isinstance(value, list) or not all(_is_index(i) for i in value):
            raise self.error(key, "a list of integers >= 0")
        return frozenset(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """An integer or a list of integers >= 0; empty if absent."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_index(i) for i in ids):
            raise self.error(key, "an integer >= 0 or a list of them")
        return tuple(ids)

    def require(self, holds: bool, key: str, allowed: str) -> None:
        """Raise for ``key`` unless ``holds``."""
        if not holds:
            raise self.error(key, allowed)

    def error(self, key: str, allowed: str) -> UnsupportedModelError:
        """The error for the value at ``key``."""
        if key in self._values:
            state = shown(self._values[key])
        elif key in self._defaults:
            state = f"missing, which means {shown(self._defaults[key])}"
        else:
            state = "missing"
        return UnsupportedModelError(f"{self._where}{key} is {state}: allowed is {allowed}")

    def _value(self, key: str, default: Any, allowed: str) -> Any:
        value = self.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(key, allowed)
        return default


def shown(value: Any) -> str:
    """A value of a configuration in a message: null, true and false as they stand there, long ones cut."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else _digits(value) or repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _digits(value: Any) -> str:
    """Of an integer too long to be written out (Python refuses to), else empty."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length()} bits"
    return ""


def _one_of(allowed: Sequence[str]) -> str:
    return "one of " + ", ".join(map(repr, allowed))


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
