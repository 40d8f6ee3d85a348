"""A bench of wires: our end here, the other ends in a thread (local) or in processes of their own (the others)."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Sequence
from typing import NamedTuple

from actors.transport.base import Medium, Wire
from actors.transport.endpoint import Endpoint
from actors.transport.local import LocalNetwork
from actors.transport.nccl import NcclWire
from actors.transport.nccl_group import GroupPlan, NcclGroup
from actors.transport.nccl_join import Lobby, join_as_shard
from tests.multiprocess.peers import Peer
from tests.multiprocess.transport.encrypted import folder, tls_for
from tests.multiprocess.transport.nccl_double import DoubleBackend
from tests.multiprocess.transport.remote import HERE, NODE, PATIENCE, SECRET, Job, Remote, in_thread, soon


class Link(NamedTuple):
    """Our end of a wire, and whoever is at the other."""

    wire: Wire
    remote: Remote


class Crew:
    """Processes for the other ends of wires, kept from test to test: to start one takes most of a second."""

    def __init__(self) -> None:
        self._idle: list[Peer] = []

    @property
    def size(self) -> int:
        """How many are idle; each holds one descriptor of this process."""
        return len(self._idle)

    def hire(self, job: Job) -> Remote:
        """One who does this job."""
        worker = self._idle.pop() if self._idle else Peer("tests.multiprocess.transport.remote:run_worker")
        worker.send(job)
        return Remote(worker)

    def take_back(self, remote: Remote) -> None:
        """The job is over."""
        worker = remote.end()
        if worker is not None:
            self._idle.append(worker)

    def close(self) -> None:
        """End all processes."""
        for worker in self._idle:
            worker.close()
        self._idle.clear()


class Bench:
    """Makes links and takes all of them down again."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._wires: queue.Queue[Wire] = queue.Queue()
        self._endpoint = Endpoint(HERE, NODE, SECRET, on_wire=self._wires.put)
        self._encrypted = Endpoint(HERE, NODE, SECRET, on_wire=self._wires.put, tls=tls_for(Medium.TLS))
        self._network = LocalNetwork()
        self._local = self._network.endpoint(HERE, self._wires.put)
        self._lobby = Lobby()
        self._gathering = Endpoint(HERE, NODE, SECRET, on_wire=self._lobby.park)
        self._groups: list[NcclGroup] = []
        self._links: list[Link] = []

    def link(self, medium: Medium, name: str = "there", ring_bytes: int = 4 << 20) -> Link:
        """A new wire of this medium to a new remote called ``name``; over nccl in a group of its own."""
        return self.links(medium, [name], ring_bytes)[0]

    def links(self, medium: Medium, names: Sequence[str], ring_bytes: int = 4 << 20) -> list[Link]:
        """New wires to as many new remotes; over nccl all in one group."""
        if medium is Medium.NCCL:
            made = self._grouped(names, ring_bytes)
        else:
            made = [self._paired(medium, name, ring_bytes) for name in names]
        assert [(link.wire.peer, link.wire.medium) for link in made] == [(name, medium) for name in names]
        self._links += made
        return made

    def batch(self, links: Sequence[Link]) -> contextlib.AbstractContextManager[None]:
        """Inside it sends over these links go as a router sends them: over nccl as one exchange."""
        wire = links[0].wire
        return wire._group.batch() if isinstance(wire, NcclWire) else contextlib.nullcontext()

    def mute(self, medium: Medium) -> Job:
        """For ``run_mute``: somebody who never gets as far as a wire."""
        plan = None
        if medium is Medium.NCCL:
            plan = GroupPlan(len(self._groups) + 1, b"", b"", b"", ("mute",), (HERE,))
        endpoint = self._encrypted if medium is Medium.TLS else self._endpoint
        return Job("mute", (self._gathering if plan else endpoint).address, medium, 0, plan)

    def wait_for_mute(self, job: Job) -> None:
        """What the one who accepts does meanwhile. Over nccl it waits: WireTimeout tells who did not come."""
        if job.plan is not None:
            self._lobby.take(job.plan, soon(0.5))

    def close(self) -> None:
        """Every wire, remote, group and endpoint."""
        for link in self._links:
            link.wire.close()
        for group in self._groups:
            group.close()
        for link in self._links:
            self._crew.take_back(link.remote)
        self._links.clear()
        self._groups.clear()
        self._lobby.close()
        for endpoint in (self._endpoint, self._encrypted, self._gathering, self._local):
            endpoint.close()

    def _paired(self, medium: Medium, name: str, ring_bytes: int) -> Link:
        if medium is Medium.LOCAL:
            other = self._network.endpoint(name)
            remote = in_thread(lambda: other.connect(self._local.address, soon()))
        else:
            endpoint = self._encrypted if medium is Medium.TLS else self._endpoint
            remote = self._crew.hire(Job(name, endpoint.address, medium, ring_bytes, certificates=folder()))
        return Link(self._wires.get(timeout=PATIENCE), remote)

    def _grouped(self, names: Sequence[str], ring_bytes: int) -> list[Link]:
        backend = DoubleBackend()
        ids = backend.unique_id(), backend.unique_id(), backend.unique_id()
        plan = GroupPlan(len(self._groups) + 1, *ids, tuple(names), (HERE,))
        remotes = [self._crew.hire(Job(name, self._gathering.address, Medium.NCCL, ring_bytes, plan)) for name in names]
        group, wires = join_as_shard(plan, HERE, self._lobby, backend, soon(), PATIENCE)
        self._groups.append(group)
        return [Link(wires[name], remote) for name, remote in zip(names, remotes, strict=True)]
