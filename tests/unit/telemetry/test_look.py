"""How often the controller is asked, and what is told while it does not answer."""

from __future__ import annotations

import logging

import pytest

from cluster.telemetry.look import ClusterLook
from tests.unit.telemetry.controllers import Controller, view


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def epoch(look: ClusterLook) -> float | None:
    """That of the expert map, as one of the figures."""
    figures = look.now()
    return figures["expertmesh.expert_map.epoch"][0][0] if figures is not None else None


def test_the_controller_is_asked_once_a_second_at_most() -> None:
    controller, clock = Controller(view(expert_map_epoch=1)), Clock()
    look = ClusterLook(controller, clock)
    for clock.now in (0.0, 0.5, 0.99):
        assert epoch(look) == 1
    assert controller.asked == 1

    controller.view = view(expert_map_epoch=2)
    clock.now = 1.0
    assert epoch(look) == 2
    assert controller.asked == 2


def test_there_are_no_old_figures_when_the_controller_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    controller, clock = Controller(view()), Clock()
    look = ClusterLook(controller, clock)
    assert look.now() is not None

    controller.view = None
    with caplog.at_level(logging.WARNING):
        for clock.now in (1.0, 1.5, 2.5, 4.0):
            assert look.now() is None
    assert controller.asked == 4
    assert len(caplog.records) == 1, "said once"

    controller.view = view()
    clock.now = 10.0
    assert look.now() is not None


def test_a_closed_look_asks_nobody() -> None:
    controller = Controller(view())
    look = ClusterLook(controller, Clock())
    look.close()

    assert look.now() is None
    assert controller.asked == 0


def test_what_was_known_is_not_told_after_the_end() -> None:
    """The last export would show it as if it still held."""
    look = ClusterLook(Controller(view()), Clock())
    assert look.now() is not None
    look.close()
    assert look.now() is None
