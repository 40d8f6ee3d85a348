from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.hub import Hub
from tests.hub_server import HubServer, hub_server


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub_server() as running:
        yield running


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> Hub:
    return Hub(server.url, tmp_path / "cache")
