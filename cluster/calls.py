"""Calls to several actors at the same time, and what came of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from cluster.fleet import ActorUnreachable

log = logging.getLogger(__name__)

FIGURES_TIMEOUT_S = 2.0

LIFE_TIMEOUT_S = 5.0
"""An actor that does not tell its figures within this time is taken for dead where its life is in doubt."""


def answers(calls: Mapping[str, Future[Any]], timeout_s: float = FIGURES_TIMEOUT_S) -> dict[str, Any]:
    """The results by name, without those that do not come in time."""
    deadline = time.monotonic() + timeout_s
    came = {}
    for name, call in calls.items():
        try:
            came[name] = call.result(max(0.0, deadline - time.monotonic()))
        except Exception as error:  # whatever keeps it from telling its figures, the others' are still wanted
            log.warning("%s does not tell its figures: %r", name, error)
    return came


def results(calls: Mapping[str, Future[Any]], deadline: float, may_be_gone: bool = False) -> dict[str, Any]:
    """The results by name. Waits for all of them, also after one has failed; then raises the first failure.

    With ``may_be_gone`` an actor that is unreachable is no failure: it is left out. TimeoutError after ``deadline``
    (absolute, monotonic).
    """
    came = {}
    failures: list[BaseException] = []
    for name, call in calls.items():
        try:
            came[name] = call.result(max(0.0, deadline - time.monotonic()))
        except Exception as error:  # raised below, when nobody works for what has failed any more
            if may_be_gone and isinstance(error, ActorUnreachable):
                log.warning("%s is gone: %s", name, error)
            else:
                failures.append(error)
    if failures:
        raise failures[0]
    return came


def log_failure(done: Future[Any]) -> None:
    """A callback for calls that nobody waits for."""
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("an actor did not follow: %r", error)
