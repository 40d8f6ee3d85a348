"""Kubernetes' way to write numbers: 200m, 4Gi, 1e3 (apimachinery, pkg/api/resource/quantity.go)."""

from __future__ import annotations

import re
from decimal import Decimal

from tests.manifests.documents import ManifestError

_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_UNITS = {name: Decimal(10) ** power for name, power in _DECIMAL.items()}
_UNITS |= {f"{name}i": Decimal(2) ** (10 * power) for power, name in enumerate("KMGTPE", 1)}


def amount(quantity: str | int | float) -> Decimal:
    """What ``quantity`` says, in ones: cores, bytes, devices. Raises ManifestError; a negative number is none."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,2})|([A-Za-z]*))", str(quantity))
    if match is None or (match[3] or "") not in _UNITS:
        raise ManifestError(f"{quantity}: not a quantity; allowed units are {', '.join(filter(None, _UNITS))}")
    return Decimal(match[1]).scaleb(int(match[2] or 0)) * _UNITS[match[3] or ""]
