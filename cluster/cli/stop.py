"""``expertmesh stop``: end a cluster whose ``expertmesh serve`` is gone. Its actors are detached and outlive it."""

from __future__ import annotations

import ray

from cluster.cli.terminal import complain
from cluster.config import ConfigError
from cluster.ray_session import join, sweep


def run_stop(address: str) -> int:
    """Remove every actor and placement group of ours from the Ray cluster; the exit status."""
    try:
        if not join(address):
            return complain(f"no Ray cluster answers at {address!r}; one that `expertmesh serve` started ended with it")
        try:
            left = sweep()
        finally:
            ray.shutdown()
    except ConfigError as error:
        return complain(str(error))
    print(f"removed: {', '.join(left)}" if left else "nothing of expertmesh runs there")
    return 0
