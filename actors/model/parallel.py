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


def load_each(
    load: Callable[[Key], Loaded], keys: Iterable[Key], readers: int = READERS, leaves_holes: bool = True
) -> list[Loaded]:
    """``[load(key) for key in keys]``, ``readers`` at a time. The first error ends it; loads not begun are left out.

    Where the loads ``leaves_holes``, having freed some of what they made, that memory is given back to the system.
    """
    with ThreadPoolExecutor(readers, thread_name_prefix="load") as pool:
        try:
            loaded = list(pool.map(load, keys))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if leaves_holes:
        trim()
    return loaded
