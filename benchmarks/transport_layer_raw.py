"""The frames of one MoE layer through shared buffers and pipes: what moving them costs at least.

Every process copies what it gets out of the buffer, as who has to answer for it must, and what it sends into one. There
is no header, no deadline, no order but the obvious one, and nobody may die. Given a shape, the router also makes the
frames and combines what comes back, by the project's own functions on plain tensors, and the experts pick their rows;
without one nothing is computed or looked at.
"""

from __future__ import annotations

import mmap
import os
import select
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from actors.dispatch import Owners, dispatch_rows, split_rows
from actors.messages import tensor_bytes
from actors.model.combine import Piece, combine_pieces
from benchmarks.transport_figures import LayerBytes
from benchmarks.transport_lanes import timed
from benchmarks.transport_layer import DTYPE, Shape
from benchmarks.transport_peer import Peer, pin, until_closed


class Link:
    """One end of a pair of buffers of ``there`` and ``back`` bytes, with a pipe each way. It can be handed to a
    process; ``open`` it there."""

    def __init__(self, path: str, out: tuple[int, int], into: tuple[int, int], bell: Connection, ring: Connection):
        """``out``, ``into``: where in the file at ``path`` what it sends and what it gets lies: offset, bytes."""
        self.path, self.out, self.into, self.bell, self.ring = path, out, into, bell, ring

    def open(self) -> Link:
        """Map the memory and make what the frames are copied from and to."""
        with open(self.path, "r+b") as file:
            shared = memoryview(mmap.mmap(file.fileno(), self.out[1] + self.into[1]))
        self.to = shared[self.out[0] :][: self.out[1]]
        self.frm = shared[self.into[0] :][: self.into[1]]
        self.own_out, self.own_in = memoryview(bytearray(self.out[1])), bytearray(self.into[1])
        return self

    def send(self) -> None:
        """Copy in, ring."""
        self.to[:] = self.own_out
        os.write(self.ring.fileno(), b"x")

    def recv(self) -> None:
        """Wait for the bell, copy out."""
        if not os.read(self.bell.fileno(), 1):
            raise EOFError
        self.own_in[:] = self.frm


class RawLayer:
    """An attention shard, a router, and an expert shard for each of ``moved``'s frames. See above for ``shape``."""

    def __init__(self, moved: LayerBytes, shape: Shape | None) -> None:
        with ExitStack() as stack:
            ends: list[Link] = []
            theirs: list[Link] = []
            for there, back in ((moved.rows, moved.rows), *zip(moved.dispatch, moved.results, strict=True)):
                for link, links in zip(_linked(stack, there, back), (ends, theirs), strict=True):
                    links.append(link)
            for number, link in enumerate(theirs[1:]):
                stack.enter_context(Peer(_serve_shard, number, link, shape, len(moved.results)))
            stack.enter_context(Peer(_serve_router, theirs[0], ends[1:], shape))
            self._attention = stack.enter_context(Peer(_serve_attention, ends[0]))
            for link in (*ends, *theirs):
                link.bell.close()
                link.ring.close()
            self._stack = stack.pop_all()

    def burst(self, count: int) -> list[float]:
        """Seconds of ``count`` layers."""
        return list(self._attention.call(count))

    def close(self) -> None:
        """End all processes: each end of a pipe ends the next."""
        self._stack.close()


def _linked(stack: ExitStack, there: int, back: int) -> tuple[Link, Link]:
    memory = os.memfd_create("benchmark", os.MFD_CLOEXEC)
    stack.callback(os.close, memory)
    os.ftruncate(memory, there + back)
    path = f"/proc/{os.getpid()}/fd/{memory}"
    their_bell, ring = Pipe(duplex=False)
    bell, their_ring = Pipe(duplex=False)
    first, second = (0, there), (there, back)
    return Link(path, first, second, bell, ring), Link(path, second, first, their_bell, their_ring)


def _serve_attention(control: Connection, link: Link) -> None:
    pin(0)
    link.open()

    def layer() -> None:
        link.send()
        link.recv()

    def burst(count: int) -> list[float]:
        layer()
        return [timed(layer) for _ in range(count)]

    until_closed(control, burst)


def _serve_router(control: Connection, attention: Link, shards: list[Link], shape: Shape | None) -> None:
    pin(1)
    torch.set_num_threads(1)
    attention.open()
    by_bell = {link.open().bell.fileno(): (number, link) for number, link in enumerate(shards)}
    bells = select.poll()
    for bell in by_bell:
        bells.register(bell, select.POLLIN)
    work = None if shape is None else Work(shape, attention, shards)
    with suppress(EOFError, BrokenPipeError), torch.inference_mode():
        while True:
            attention.recv()
            if work is not None:
                work.split()
            for number, link in enumerate(shards):
                if work is not None:
                    work.fill(number)
                link.send()
            owed = len(shards)
            while owed:
                for bell, _ in bells.poll():
                    number, link = by_bell[bell]
                    link.recv()
                    owed -= 1
                    if work is not None:
                        work.place(number)
            if work is not None:
                work.combine()
            attention.send()


class Work:
    """What a router does with the frames of a layer, in the memory from and to which links copy them."""

    def __init__(self, shape: Shape, attention: Link, shards: list[Link]) -> None:
        self._shape, self._attention, self._shards = shape, attention, shards
        self._chosen, self._weight = shape.choice()
        home = np.arange(shape.experts) % len(shards)
        self._owners = Owners(home[:, None], np.ones_like(home))
        self._load = np.zeros_like(home)

    def split(self) -> None:
        """Which rows go to which shard."""
        self._shares = dispatch_rows(self._chosen, self._owners, 0, self._load)
        self._came: list[Piece] = []

    def fill(self, number: int) -> None:
        """The frame to a shard: its rows; the pairs behind them are not looked at."""
        share = self._shares[number]
        rows = _rows(self._attention.own_in, self._shape.rows, self._shape.width)
        picked = rows.index_select(0, torch.from_numpy(share.rows))
        self._shards[number].own_out[: picked.nbytes] = tensor_bytes(picked)

    def place(self, number: int) -> None:
        """A shard's results."""
        slots = self._shares[number].pair_slot
        rows = memoryview(self._shards[number].own_in)[: slots.size * self._shape.width * DTYPE.itemsize]
        self._came.append(Piece(slots, rows))

    def combine(self) -> None:
        """The frame back."""
        combine_pieces(self._came, DTYPE, self._weight, self._attention.own_out)


def _rows(buffer: bytearray, count: int, width: int) -> Tensor:
    return torch.frombuffer(buffer, dtype=DTYPE, count=count * width).view(count, width)


def _serve_shard(control: Connection, number: int, link: Link, shape: Shape | None, shards: int) -> None:
    pin(number)
    torch.set_num_threads(1)
    link.open()
    with suppress(EOFError, BrokenPipeError), torch.inference_mode():
        while shape is None:
            link.recv()
            link.send()
        chosen, _ = shape.choice()
        share = split_rows(chosen, np.arange(chosen.size), chosen.reshape(-1) % shards)[number]
        pairs = torch.from_numpy(share.pair_row.astype(np.int64))
        out = torch.empty(pairs.numel(), shape.width, dtype=DTYPE)
        while True:
            link.recv()
            torch.index_select(_rows(link.own_in, share.rows.size, shape.width), 0, pairs, out=out)
            link.own_out[: out.nbytes] = tensor_bytes(out)
            link.send()
