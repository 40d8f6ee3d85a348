"""What this room raises."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """A configuration asks for what is not built. The message names key, value and what is allowed."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file, the tensor, and what was expected."""


class MissingExpert(LookupError):
    """Rows were sent to a bank that does not hold their expert."""

    def __init__(self, layer: int, expert: int) -> None:
        super().__init__(f"expert {expert} of layer {layer} is not held here")
        self.layer = layer
        self.expert = expert

    def __reduce__(self) -> tuple[type[MissingExpert], tuple[int, int]]:
        return MissingExpert, (self.layer, self.expert)
