"""The expert map and the first plan for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.expert_map import ExpertMap, NoHome, held_only_by, moves, replaced, single_replica_map, without


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 9))
def test_every_expert_has_one_home_and_shards_are_even(layers: int, experts: int, n_shards: int) -> None:
    shards = tuple(f"expert-{n}" for n in range(n_shards))
    made = single_replica_map(1, range(layers), experts, shards)
    held = [made.held_by(shard) for shard in shards]
    assert sorted(pair for pairs in held for pair in pairs) == [(la, e) for la in range(layers) for e in range(experts)]
    for layer in range(layers):
        counts = [sum(la == layer for la, _ in pairs) for pairs in held]
        assert max(counts) - min(counts) <= 1
    for shard, pairs in zip(shards, held, strict=True):
        assert all(made.homes(layer)[expert] == shard for layer, expert in pairs)


def test_what_is_not_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 2, expert 1: no shard holds it"):
        ExpertMap(1, 2, {2: (("a",), ())})
    with pytest.raises(ValueError, match="two replicas on one shard"):
        ExpertMap(1, 1, {0: (("a", "a"),)})
    with pytest.raises(ValueError, match="layer 0: 1 experts, expected 2"):
        ExpertMap(1, 2, {0: (("a",),)})
    with pytest.raises(ValueError, match="epochs start at 1"):
        ExpertMap(0, 1, {0: (("a",),)})
    with pytest.raises(ValueError, match="shards: none"):
        single_replica_map(1, [0], 4, ())


BEFORE = ExpertMap(3, 2, {1: (("a", "b"), ("b",)), 4: (("a",), ("a", "c"))})


def test_a_map_without_a_shard() -> None:
    assert without(BEFORE, ["c", "never-there"], 4) == ExpertMap(4, 2, {1: (("a", "b"), ("b",)), 4: (("a",), ("a",))})
    with pytest.raises(NoHome, match=r"without a, c no shard holds layer 4 expert 0, layer 4 expert 1$") as caught:
        without(BEFORE, {"c", "a"}, 4)
    assert caught.value.experts == ((4, 0), (4, 1))
    with pytest.raises(NoHome, match=r"layer 0 expert 7 and 32 more$"):
        without(single_replica_map(1, [0], 40, ("only",)), ["only"], 2)
    assert held_only_by(BEFORE, ["b"]) == ((1, 1),)
    assert held_only_by(BEFORE, []) == ()


def test_a_shard_takes_anothers_place() -> None:
    assert replaced(BEFORE, "a", "z", 4) == ExpertMap(4, 2, {1: (("z", "b"), ("b",)), 4: (("z",), ("z", "c"))})
    with pytest.raises(ValueError, match="old: 'x' is not in the map; its shards: a, b, c"):
        replaced(BEFORE, "x", "z", 4)
    with pytest.raises(ValueError, match="new: 'b' is in the map already"):
        replaced(BEFORE, "a", "b", 4)


def test_moves_are_what_has_to_be_read() -> None:
    after = ExpertMap(4, 2, {1: (("b", "c"), ("b",)), 4: (("a",), ("d",))})
    assert moves(BEFORE, after) == {"c": ((1, 0),), "d": ((4, 1),)}
    assert moves(after, BEFORE) == {"a": ((1, 0), (4, 1)), "c": ((4, 1),)}
    assert moves(BEFORE, BEFORE) == {}
    assert moves(None, BEFORE) == {shard: BEFORE.held_by(shard) for shard in "abc"}
