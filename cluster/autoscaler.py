"""The thread that lets the number of expert shards follow the load; ``placement/autoscale.py`` decides what to do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from expertmesh.v1.control_pb2 import ClusterEventKind

from cluster.config import AutoscaleConfig
from cluster.events import EventLog
from cluster.expert_fleet import ExpertFleet
from placement.autoscale import PoolSnapshot, State, decide

log = logging.getLogger(__name__)


class Autoscaler:
    """Every ``interval_s`` it looks at the expert shards' load; ``apply(wanted, reason)`` carries out what is decided,
    or returns False."""

    def __init__(
        self,
        config: AutoscaleConfig,
        events: EventLog,
        experts: ExpertFleet,
        changing: Callable[[], bool],
        apply: Callable[[int, str], bool],
    ) -> None:
        self._config = config
        self._events = events
        self._experts = experts
        self._changing = changing
        self._apply = apply
        # what the model and the slots allow counts as well: else an impossible decision would come again and again
        least, most = experts.least, experts.most
        self._policy = replace(
            config.policy,
            minimum=min(max(config.minimum, least), most),
            maximum=min(max(config.maximum, least), most),
        )
        self._state = State()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoscaler", daemon=True)

    def start(self) -> None:
        """Start to look, unless it is off."""
        if self._config.mode != "off":
            self._thread.start()

    def stop(self) -> None:
        """End the thread; a change under way ends by itself. Idempotent."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._config.interval_s):
            try:
                self._look()
            except Exception as error:  # a change that failed has been undone; the load is looked at again later
                log.warning("scaling failed", exc_info=True)
                text = f"scaling by load failed: {type(error).__name__}: {error}"
                self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_FAILED, text)

    def _look(self) -> None:
        decision, state = decide(self._snapshot(), self._policy, self._state)
        if not decision.change:
            self._state = state
        elif self._config.mode == "dry-run":
            self._state = state
            text = f"would scale experts to {decision.wanted}: {decision.reason}"
            self._events.tell(ClusterEventKind.CLUSTER_EVENT_KIND_SCALING_DECIDED, text)
        elif self._apply(decision.wanted, f"scaling experts to {decision.wanted}: {decision.reason}"):
            self._state = state  # else it was not carried out, and is decided anew at the next look

    def _snapshot(self) -> PoolSnapshot:
        shards = self._experts.shards
        stats = self._experts.stats(shards)
        return PoolSnapshot(
            now_s=time.monotonic(),
            shards=len(shards),
            busy_s={name: figures.busy_s for name, figures in stats.items()},
            # pairs: a shard's rows hardly get fewer with more shards, for each row goes to several of them
            pairs={name: figures.pairs for name, figures in stats.items()},
            changing=self._changing(),
        )
