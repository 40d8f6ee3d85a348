"""Two nodes with addresses of their own, a bridge between them, and a link that is cut and heals."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.transport.base import Medium
from tests.checkpoints import write_qwen3_moe
from tests.multiprocess import namespaces
from tests.multiprocess.namespaces import Network, NoNamespaces, enter, joined
from tests.multiprocess.two_nodes import ROW_BLOCK, STEP_TIMEOUT_S, two_nodes
from tests.paged_runner import PagedRunner, random_ids

_NETNS = Path("/var/run/netns")


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        with joined(2) as network:
            yield network
    except NoNamespaces as reason:
        pytest.skip(f"network namespaces are not allowed here: {reason}")
    assert not _ours(), "namespaces were left behind"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_qwen3_moe(path)
    return path


def _ours() -> list[str]:
    return [name for name in os.listdir(_NETNS) if name.startswith(f"expertmesh-{os.getpid()}-")]


def test_a_cut_link_is_a_typed_error_in_time_and_once_healed_the_stream_goes_on(
    network: Network, checkpoint: Path
) -> None:
    prompt = random_ids(9, seed=1)
    (expected,) = PagedRunner(checkpoint, row_block=ROW_BLOCK).greedy([prompt], 12)
    far = network.nodes[1]
    with two_nodes(network, checkpoint, prompt) as cluster:
        said = cluster.grow(4)
        assert (said.tokens, said.error) == ([*prompt, *expected[:4]], "")

        network.cut(far)
        said = cluster.grow(4)
        assert said.error.startswith("MoEUnavailable")
        assert "no answer within 2 s from expert-" in said.error
        assert STEP_TIMEOUT_S <= said.seconds < 2 * STEP_TIMEOUT_S
        assert said.tokens == [*prompt, *expected[:4]], "a token of a void step was published"

        network.heal(far)
        said = cluster.grow(8)
        assert (said.tokens, said.error) == ([*prompt, *expected], "")

        media = {wire.peer: wire.medium for wire in cluster.call("router-0", "stats").wires}
        assert media == {"attention-0": Medium.SHM, "expert-0": Medium.TCP, "expert-1": Medium.TCP}
        assert all(cluster.call(name, "stats").rows for name in ("expert-0", "expert-1"))


def test_a_cut_that_heals_within_the_deadline_is_only_a_delay(network: Network, checkpoint: Path) -> None:
    prompt = random_ids(9, seed=2)
    (expected,) = PagedRunner(checkpoint, row_block=ROW_BLOCK).greedy([prompt], 6)
    with two_nodes(network, checkpoint, prompt) as cluster:
        cluster.grow(2)
        network.cut(network.nodes[1])
        heal = threading.Timer(STEP_TIMEOUT_S / 8, network.heal, (network.nodes[1],))
        heal.start()
        said = cluster.grow(4)
        heal.join()
        assert (said.tokens, said.error) == ([*prompt, *expected], "")
        assert said.seconds >= STEP_TIMEOUT_S / 8, "the link was not cut"


def test_what_was_made_is_removed_when_making_it_fails(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(network: Network, node: str) -> None:
        raise NoNamespaces("no links today")

    made = _ours()
    monkeypatch.setattr(namespaces, "_plug_in", fail)
    with pytest.raises(NoNamespaces, match="no links today"), joined(1, "again"):
        pytest.fail("it has no link")
    assert _ours() == made


def test_a_node_is_its_own_network(network: Network) -> None:
    seen: list[str] = []

    def look() -> None:
        enter(network.nodes[0])
        seen.extend(name for _, name in socket.if_nameindex())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert sorted(seen) == ["eth0", "lo"]
    assert "bridge" not in {name for _, name in socket.if_nameindex()}
