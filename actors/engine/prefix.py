"""Keys by which full KV blocks are found again: a hash over all tokens up to the block's end.

A block's key is chained to the one before it, as in vLLM's prefix caching, so that equal keys mean equal tokens from
the first on. The chain begins with the tenant and the adapter: nobody finds, or can time, what another tenant computed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_KEY_BYTES = 16


def root_key(tenant: str, adapter: str) -> bytes:
    """Where the chain of a tenant and an adapter begins; no two pairs have the same."""
    name = tenant.encode("utf-8", "surrogatepass")
    text = len(name).to_bytes(8, "little") + name + adapter.encode("utf-8", "surrogatepass")
    return blake2b(text, digest_size=_KEY_BYTES, person=b"prefix root").digest()


def block_key(before: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a block of ``token_ids`` (int64) behind the block, or root, of key ``before``."""
    return blake2b(before + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


class PrefixKeys:
    """The keys of one sequence's full blocks; each block is hashed once."""

    def __init__(self, tenant: str, adapter: str, block_size: int) -> None:
        self._root = root_key(tenant, adapter)
        self._block_size = block_size
        self._keys: list[bytes] = []

    def first(self, n: int, token_ids: Sequence[int]) -> list[bytes]:
        """Those of the first ``n`` blocks; ``token_ids`` is the whole sequence, which may only have grown."""
        for i in range(len(self._keys), n):
            before = self._keys[-1] if self._keys else self._root
            self._keys.append(block_key(before, token_ids[i * self._block_size : (i + 1) * self._block_size]))
        return self._keys[:n]
