"""Several tensors read at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .heap import trim

Key = TypeVar("Key")
Loaded = TypeVar("Loaded")

READERS = 4
"""Reads under way in one process: enough to keep a disk or a network file system busy, and cheap to hold."""


def load_each(load: Callable[[Key], Loaded], keys: Iterable[Key]) -> list[Loaded]:
    """``[load(key) for key in keys]``, several at a time. The first error ends it; loads not begun are left out.

    Memory that the loads have freed is given back to the system.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="load") as pool:
        try:
            loaded = list(pool.map(load, keys))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    trim()
    return loaded
