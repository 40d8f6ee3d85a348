"""Small work stays in the event loop, large work leaves it."""

from __future__ import annotations

import threading

import pytest

from cluster.gateway.off_loop import INLINE_ENTRIES, by_size


@pytest.mark.parametrize(("entries", "here"), [(0, True), (INLINE_ENTRIES, True), (INLINE_ENTRIES + 1, False)])
async def test_where_it_is_done(entries: int, here: bool) -> None:
    thread = await by_size(entries, threading.current_thread)
    assert (thread is threading.current_thread()) == here


@pytest.mark.parametrize("entries", [0, INLINE_ENTRIES + 1])
async def test_its_result_and_its_error_come_back(entries: int) -> None:
    assert await by_size(entries, sorted, [2, 3, 1], reverse=True) == [3, 2, 1]
    with pytest.raises(ValueError, match="invalid literal"):
        await by_size(entries, int, "x")
