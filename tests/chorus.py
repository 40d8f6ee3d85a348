"""Many greedy streams that run over and over while a test does something to the cluster; every one must be right."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from tests.serving import Client, Reference, ids_request

_PATIENCE_S = 100.0


@dataclass
class Chorus:
    """What the streams did so far. ``gaps``: (begin, seconds) of each wait for a next token, from the second on."""

    answers: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    _ended: bool = False
    _news: threading.Condition = field(default_factory=threading.Condition)

    def after(self, tokens: int) -> None:
        """Return when so many more tokens have come over all streams, or a stream went wrong."""
        with self._news:
            until = self.tokens + tokens
            assert self._news.wait_for(lambda: self.tokens >= until or bool(self.wrong), _PATIENCE_S), "no tokens"

    def longest_gap(self, since: float = 0.0) -> float:
        """Seconds of the longest wait that ended after ``since`` (monotonic)."""
        with self._news:
            return max((seconds for begin, seconds in self.gaps if begin + seconds >= since), default=0.0)

    def _run(self, client: Client, number: int, prompt: Sequence[int], wanted: Reference) -> None:
        while not self._ended and not self.wrong:
            try:
                tokens = self._listen(client, prompt, len(wanted.tokens))
            except grpc.RpcError as error:
                self._note(f"stream {number}: {error.code()} {error.details()}")
                return
            if not wanted.agrees(tokens):
                self._note(f"stream {number}: other tokens: {tokens}, wanted {wanted.tokens}")
            with self._news:
                self.answers += 1

    def _listen(self, client: Client, prompt: Sequence[int], count: int) -> list[int]:
        tokens: list[int] = []
        last = None
        for message in client.inference.Generate(ids_request(prompt, count), timeout=_PATIENCE_S):
            now = time.monotonic()
            if not message.token_ids:
                continue
            tokens += message.token_ids
            with self._news:
                if last is not None:
                    self.gaps.append((last, now - last))
                self.tokens += len(message.token_ids)
                self._news.notify_all()
            last = now
        return tokens

    def _note(self, text: str) -> None:
        with self._news:
            self.wrong.append(text)
            self._news.notify_all()


@contextmanager
def singing(client: Client, prompts: Sequence[Sequence[int]], wanted: Sequence[Reference]) -> Iterator[Chorus]:
    """One stream per reference, each begun again when it has ended, until the block is left; then all must be right.

    The block is entered when every stream has had a token.
    """
    chorus = Chorus()
    parts = [(client, number, prompts[number], reference) for number, reference in enumerate(wanted)]
    threads = [threading.Thread(target=chorus._run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    try:
        chorus.after(4 * len(threads))
        yield chorus
    finally:
        chorus._ended = True
        for thread in threads:
            thread.join(_PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert not chorus.wrong, chorus.wrong
    assert chorus.answers >= len(threads)
