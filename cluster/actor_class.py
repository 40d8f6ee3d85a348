"""Which class an actor is of, by name: whoever starts actors need not import what they compute with."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class ActorClass:
    """A class at the top of a module."""

    module: str
    name: str

    def load(self) -> type:
        """The class itself, imported here."""
        found = getattr(import_module(self.module), self.name)
        assert isinstance(found, type)
        return found


ATTENTION_SHARD = ActorClass("actors.attention", "AttentionShard")
ROUTER = ActorClass("actors.router", "Router")
EXPERT_SHARD = ActorClass("actors.expert", "ExpertShard")
GATEWAY = ActorClass("cluster.gateway.server", "Gateway")
RAY_CONTROLLER = ActorClass("cluster.ray_fleet", "RayController")
