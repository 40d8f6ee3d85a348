"""Clusters in this process, over a random deepseek_v3 checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.actor_class import ActorClass
from cluster.config import ServerConfig, load_config
from cluster.local_fleet import LocalFleet
from tests.serving import tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Its folder, and the Hugging Face model that wrote it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("v3")
    return path, tiny_model(path)


@pytest.fixture(scope="session")
def local() -> Callable[..., ServerConfig]:
    """``local(path, **dotted_keys)``: a configuration without Ray, on a free port."""

    def config(path: Path, **overrides: Any) -> ServerConfig:
        keys = {
            "transport": "local",
            "gateway.port": 0,
            "gateway.http_port": 0,
            "attention.threads": 1,
            "experts.threads": 1,
            "experts.shards": 2,
        }
        return load_config(None, {"model": str(path), **keys, "attention.kv_memory": "4MiB", **overrides})

    return config


class Actors:
    """The objects behind the actors of local clusters."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Any, Callable[[str], Any]]] = {}

    def __getitem__(self, name: str) -> Any:
        return self._found[name][0]

    def add(self, name: str, actor: Any, twin: Callable[[str], Any]) -> None:
        """One was started; ``twin`` starts another one like it."""
        self._found[name] = actor, twin

    def of(self, role: type) -> list[Any]:
        """Those of a class, in the order in which they were started."""
        return [actor for actor, _ in self._found.values() if isinstance(actor, role)]

    def twin(self, name: str, new_name: str) -> Any:
        """Another actor with the settings of ``name``, of which the cluster's controller knows nothing."""
        return self._found[name][1](new_name)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Actors:
    """Those of the local clusters that start from now on."""
    found = Actors()
    honest = LocalFleet.spawn

    def spawn(fleet: LocalFleet, role: ActorClass, name: str, *args: Any) -> Any:
        handle = honest(fleet, role, name, *args)
        found.add(name, handle.actor, lambda new_name: honest(fleet, role, new_name, *args).actor)
        return handle

    monkeypatch.setattr(LocalFleet, "spawn", spawn)
    return found
