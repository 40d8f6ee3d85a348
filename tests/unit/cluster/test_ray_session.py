"""Which Ray cluster ``auto`` finds."""

from __future__ import annotations

import socket

import pytest
import ray
from ray._private import services

from cluster.ray_session import join


@pytest.fixture
def port() -> int:
    """Where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Ray was told to connect to."""
    told: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(ray, "init", lambda address, **options: told.append(address))
    return told


def test_the_address_that_a_killed_cluster_left_is_not_waited_for(
    joined: list[str], monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: f"127.0.0.1:{port}")
    assert not join("auto")
    assert joined == []


def test_nothing_ran_here(joined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    assert not join("auto")
    assert joined == []


def test_a_cluster_that_answers_is_joined(joined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: f"127.0.0.1:{server.getsockname()[1]}")
        assert join("auto")
    assert joined == ["auto"]
