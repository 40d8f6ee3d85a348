"""Work that is usually small, and sometimes long enough that no stream should wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

INLINE_ENTRIES = 256
"""So many log-probabilities take 2 ms to build, spell and serialise; a thread costs 0.1 ms and more where many wait."""


async def by_size(entries: int, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """``work(...)`` on so many log-probabilities: here and now, or in a thread where they are many.

    A thread gives the event loop no more time than ``work`` lets it: that has to be Python code, or short calls.
    """
    if entries <= INLINE_ENTRIES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
