"""Refused clients are told of, and a flood of them in few lines."""

from __future__ import annotations

import pytest

from actors.transport.refusals import LINE_EVERY_S, RefusalLog


def test_a_flood_is_one_line_and_the_next_tells_how_many_had_none(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    refusals = RefusalLog("router-0", lambda: now)
    for at in range(1000):
        now = 100.0 + at / 1000 * LINE_EVERY_S
        refusals.refused(f"tcp client at 10.0.0.9:{at}", ValueError("who are you"))
    now = 100.0 + LINE_EVERY_S
    refusals.refused("shm client", ValueError("nobody"))
    refusals.refused("shm client", ValueError("nobody"))
    now += LINE_EVERY_S
    refusals.refused("shm client", ValueError("late"))
    now += LINE_EVERY_S
    refusals.refused("shm client", ValueError("alone"))
    assert caplog.messages == [
        "endpoint router-0 refused a tcp client at 10.0.0.9:0: who are you",
        "endpoint router-0 refused a shm client: nobody (and 999 more since the last such line)",
        "endpoint router-0 refused a shm client: late (and 1 more since the last such line)",
        "endpoint router-0 refused a shm client: alone",
    ]
