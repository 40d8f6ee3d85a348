"""The CPU kernels of one instruction set, for tests of each that this machine has."""

from __future__ import annotations

import pytest

from actors.native.library import Library, functions, instruction_sets

CALLERS = ("products", "attention", "attention_layer", "gate", "dispatch", "quantize")
"""The modules of ``actors.native`` that call them."""

_BUILT = functions()
INSTRUCTION_SETS = instruction_sets(_BUILT) if _BUILT else []
"""Of this machine, the best first; none where the kernels are not built."""


def use(isa: str, monkeypatch: pytest.MonkeyPatch) -> Library:
    """From now on they are those of this instruction set."""
    assert _BUILT is not None
    kernels = Library(_BUILT, isa)
    for module in CALLERS:
        monkeypatch.setattr(f"actors.native.{module}.library", lambda: kernels)
    return kernels
