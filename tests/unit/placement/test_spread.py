"""Which node each bundle goes to."""

from __future__ import annotations

from placement.spec import BundleRequest, Node
from placement.spread import spread


def node(name: str, cpus: float = 4.0, alive: bool = True, **labels: str) -> Node:
    return Node(name, "10.0.0.1", cpus, labels, alive)


def test_shards_spread_over_nodes() -> None:
    wants = [BundleRequest(f"expert-{n}", 1.0) for n in range(4)]
    assert sorted(spread(wants, [node("a"), node("b"), node("c")])) == ["a", "a", "b", "c"]


def test_labels_choose_the_fleet() -> None:
    nodes = [node("a", role="attention"), node("b", role="experts"), node("c", role="experts")]
    wants = [BundleRequest("attention-0", 1.0, {"role": "attention"})]
    wants += [BundleRequest(f"expert-{n}", 1.0, {"role": "experts"}) for n in range(2)]
    assert spread(wants, nodes) == ["a", "b", "c"]


def test_no_room_is_none_and_leaves_the_others_placed() -> None:
    wants = [BundleRequest("small", 1.0), BundleRequest("big", 9.0), BundleRequest("small-2", 1.0)]
    assert spread(wants, [node("a", 2.0)]) == ["a", None, "a"]


def test_dead_nodes_get_nothing_and_cpus_are_counted() -> None:
    wants = [BundleRequest(str(n), 0.1) for n in range(11)]
    placed = spread(wants, [node("a", 1.0), node("dead", 64.0, alive=False)])
    assert placed == ["a"] * 10 + [None]


def test_same_input_same_answer() -> None:
    wants = [BundleRequest(str(n), 0.5) for n in range(8)]
    nodes = [node("b"), node("a"), node("c", 2.0)]
    assert spread(wants, nodes) == spread(wants, list(reversed(nodes)))


def test_gpus_are_counted_like_cpus() -> None:
    nodes = [Node("a", "10.0.0.1", 8.0), Node("b", "10.0.0.2", 4.0, gpus_free=2.0, gpus=2.0)]
    wants = [BundleRequest(f"expert-{n}", 0.25, gpus=1.0) for n in range(3)]
    assert spread(wants, nodes) == ["b", "b", None]
    assert spread([BundleRequest("expert-0", 0.25)], nodes) == ["a"]
