"""Seeds of rows that have none of their own: a row that is done again draws the same."""

from __future__ import annotations

import hashlib

SEED_BITS = 53
"""They survive JSON, whose numbers are doubles."""


def batch_seed(input_sha256: str) -> int:
    """The same input gives the same answers, unless another seed is asked for."""
    return _seed("batch", input_sha256)


def row_seed(batch_seed: int, custom_id: str) -> int:
    """Of one row."""
    return _seed(str(batch_seed), custom_id)


def _seed(space: str, name: str) -> int:
    digest = hashlib.sha256(f"{space}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)
