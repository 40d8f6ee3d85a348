"""The expert map and the first plan for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.expert_map import ExpertMap, single_replica_map


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
