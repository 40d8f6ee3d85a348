"""The attention shards that a gateway knows, and which of them may get requests."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from actors.transport.base import Address
from cluster.fleet import ActorHandle
from cluster.gateway.notice import Notice

_SUSPECT_S = 10.0


class OnlyShard(RuntimeError):
    """A shard cannot be retired while streams run there, because no other one could take them."""


@dataclass(frozen=True)
class AttentionPeer:
    """An attention shard as a gateway knows it: control by ``handle``, tokens over the wire to ``address``."""

    handle: ActorHandle
    address: Address

    @property
    def name(self) -> str:
        """The shard's name; it never means another one."""
        return self.address.name


class Peers:
    """The connected shards. One is *open* unless it retires, and *sound* unless it is a suspect as well.

    ``changed`` is given whenever a shard comes, goes, or changes in that. Everything runs in the gateway's event loop.
    """

    def __init__(self, changed: Notice) -> None:
        self._changed = changed
        self._peers: dict[str, AttentionPeer] = {}
        self._gone: set[str] = set()
        self._retiring: set[str] = set()
        self._suspects: dict[str, asyncio.TimerHandle] = {}

    @property
    def ready(self) -> bool:
        """True while some shard is open whose last step could be computed."""
        return any(name not in self._suspects for name in self.open_names)

    @property
    def open_names(self) -> set[str]:
        """Those that may get requests at all."""
        return self._peers.keys() - self._retiring

    def add(self, peer: AttentionPeer) -> None:
        """A shard whose wire is up. ValueError for a name that was here before: names are not used twice."""
        self.check_new(peer.name)
        self._peers[peer.name] = peer
        self._changed.give()

    def check_new(self, name: str) -> None:
        """ValueError for a name that is or was here. From any thread."""
        if name in self._peers or name in self._gone:
            raise ValueError(f"attention shard {name!r} is or was connected; allowed is a name not used before")

    def remove(self, name: str) -> None:
        """A shard is gone, for good. Idempotent."""
        self.acquit(name)
        self._retiring.discard(name)
        if self._peers.pop(name, None) is not None:
            self._gone.add(name)
            self._changed.give()

    def retire(self, name: str) -> bool:
        """Nothing new for this shard; False if it is gone already. ValueError for one that never was here."""
        if name in self._gone:
            return False
        if name not in self._peers:
            raise ValueError(f"attention shard {name!r} is not connected; connected are {sorted(self._peers)}")
        self._retiring.add(name)
        self._changed.give()
        return True

    def reopen(self, name: str) -> None:
        """A shard that was to retire stays."""
        self._retiring.discard(name)
        self._changed.give()

    def suspect(self, name: str) -> None:
        """Its last step could not be computed: others come first, until its next good one, or for a while.

        For a while only: nobody sends requests to a gateway that is not ready, so it must try again by itself.
        """
        if name not in self._peers:
            return
        self._pardon(name)
        self._suspects[name] = asyncio.get_running_loop().call_later(_SUSPECT_S, self.acquit, name)
        self._changed.give()

    def acquit(self, name: str) -> None:
        """Nothing speaks against a shard any more."""
        if self._pardon(name):
            self._changed.give()

    def best(
        self, load: Mapping[str, int], excluding: Collection[str] = (), sound_only: bool = False
    ) -> AttentionPeer | None:
        """The open shard for one more stream: a sound one if there is one, of those one with the least ``load``."""
        names = [name for name in self.open_names if name not in excluding]
        if sound_only:
            names = [name for name in names if name not in self._suspects]
        if not names:
            return None
        return self._peers[min(names, key=lambda name: (name in self._suspects, load.get(name, 0), name))]

    def _pardon(self, name: str) -> bool:
        timer = self._suspects.pop(name, None)
        if timer is not None:
            timer.cancel()
        return timer is not None
