"""Numbers as Kubernetes writes them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tests.manifests.documents import ManifestError
from tests.manifests.quantities import amount


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        *((2, 2), ("2", 2), ("0.5", "0.5"), (".5", "0.5"), ("200m", "0.2"), (0.25, "0.25")),
        *(("1k", 1000), ("1Ki", 1024), ("1.5Gi", 1.5 * 2**30), ("2T", 2 * 10**12), ("1E", 10**18), ("1Ei", 2**60)),
        *(("1e3", 1000), ("5E-1", "0.5")),
    ],
)
def test_a_quantity(quantity: str | int | float, value: str | float) -> None:
    assert amount(quantity) == Decimal(value)


@pytest.mark.parametrize("quantity", ["", "ten", "4GB", "4gi", "-1", "1 Gi", "Gi", "1e", "1Kii", True])
def test_what_is_none(quantity: str) -> None:
    with pytest.raises(ManifestError, match="not a quantity"):
        amount(quantity)
