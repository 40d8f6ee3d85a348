"""Which shard computes which pair, when shards are lost and experts have replicas."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from actors.dispatch import NOBODY
from actors.routes import ExpertRoutes
from actors.transport.local import local_pair
from placement.expert_map import ExpertMap

LAYER = 3
MAP = ExpertMap(epoch=1, n_experts=4, replicas={LAYER: (("a",), ("a", "b"), ("b", "c"), ("c", "a", "b"))})


@pytest.fixture
def routes() -> ExpertRoutes:
    return ExpertRoutes(MAP, {name: local_pair("router", name)[0] for name in MAP.shards})


def owners(routes: ExpertRoutes, turn: int, without: tuple[str, ...] = ()) -> list[str]:
    numbers = routes.owners(LAYER, without).of(np.arange(4), turn)
    return ["" if number == NOBODY else routes.names[number] for number in numbers]


def test_an_owner_always_holds_the_expert_and_replicas_take_turns(routes: ExpertRoutes) -> None:
    seen = Counter((expert, name) for turn in range(12) for expert, name in enumerate(owners(routes, turn)))
    assert seen == {
        (0, "a"): 12,
        (1, "a"): 6,
        (1, "b"): 6,
        (2, "b"): 6,
        (2, "c"): 6,
        (3, "a"): 4,
        (3, "b"): 4,
        (3, "c"): 4,
    }


def test_all_pairs_of_an_expert_in_a_batch_go_to_one_shard(routes: ExpertRoutes) -> None:
    for turn in range(6):
        assert len(set(routes.owners(LAYER).of(np.full(9, 3), turn).tolist())) == 1


def test_a_lost_shard_is_passed_over_from_then_on(routes: ExpertRoutes) -> None:
    routes.lose("b")
    for turn in range(6):
        assert "b" not in owners(routes, turn)
        assert owners(routes, turn)[1:3] == ["a", "c"]
    routes.lose("a")
    assert owners(routes, 0) == ["", "", "c", "c"]
    assert routes.lost == {"a", "b"}


def test_without_is_for_one_batch_only(routes: ExpertRoutes) -> None:
    assert owners(routes, 0, ("a",))[0] == ""
    assert owners(routes, 0)[0] == "a"


class Group:
    """As much of a group as is looked at."""

    failure: str | None = None


@pytest.fixture
def grouped(routes: ExpertRoutes) -> ExpertRoutes:
    return ExpertRoutes(MAP, routes.wires, Group())  # type: ignore[arg-type]


def test_a_group_that_is_over_takes_every_shard_with_it(grouped: ExpertRoutes) -> None:
    """One that left in order takes only itself."""
    grouped.lose("c")
    assert grouped.lost == {"c"}
    assert owners(grouped, 0) == ["a", "b", "b", "b"]
    grouped.group.failure = "b died"  # type: ignore[union-attr,misc]
    grouped.lose("b")
    assert grouped.lost == {"a", "b", "c"}
    assert owners(grouped, 0) == ["", "", "", ""]


def test_a_group_is_quiet_when_every_frame_was_answered_or_it_is_torn(
    routes: ExpertRoutes, grouped: ExpertRoutes
) -> None:
    routes.asked = grouped.asked = 2
    assert routes.quiet
    assert not grouped.quiet
    grouped.answered = 2
    assert grouped.quiet
    grouped.asked = 3
    grouped.lose("a")
    assert grouped.quiet
