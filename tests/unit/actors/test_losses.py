"""What is told of lost wires reaches whoever waits for it, at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.losses import Losses

PATIENCE = 10.0


def test_it_answers_at_once_when_something_else_holds_than_is_known() -> None:
    losses = Losses("router-0")
    assert losses.wait((0, frozenset()), 0.0) == (0, frozenset())
    losses.tell(3, frozenset({"a"}))
    assert losses.wait((0, frozenset()), PATIENCE) == losses.now == (3, {"a"})
    assert losses.wait((2, frozenset({"a"})), PATIENCE) == (3, {"a"})


def test_whoever_waits_is_told_of_news_and_of_the_end() -> None:
    losses, asked = Losses("router-0"), threading.Barrier(2)

    def wait() -> tuple[int, frozenset[str]]:
        asked.wait(PATIENCE)
        return losses.wait((0, frozenset()), PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        news = pool.submit(wait)
        asked.wait(PATIENCE)
        losses.tell(0, frozenset({"a"}))
        assert news.result(PATIENCE) == (0, {"a"})
        losses.tell(0, frozenset())
        end = pool.submit(wait)
        asked.wait(PATIENCE)
        losses.close()
        with pytest.raises(RuntimeError, match="router-0 is stopped"):
            end.result(PATIENCE)
    with pytest.raises(RuntimeError):
        losses.wait((7, frozenset()), PATIENCE)
