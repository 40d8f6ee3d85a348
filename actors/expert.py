"""ExpertShard: holds the weights of some (layer, expert) pairs and computes them for whoever sends rows.

It keeps no state of any request: a DISPATCH frame comes, a RESULTS frame with the same tag goes back. So a shard may
be added, copied, or killed while streams run.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from actors.loop import LoopThread
from actors.messages import Kind, expect_parts, tensor_bytes, tensor_from
from actors.model.experts import ExpertBank
from actors.model.families import load_spec
from actors.model.weights import Checkpoint
from actors.settings import ModelSettings
from actors.transport.base import Address, EndpointFactory, Frame, PeerGone, TransportError, Wire
from placement.expert_map import Expert


@dataclass(frozen=True)
class ExpertStats:
    """Counters since the start; ``rows`` were received, ``pairs`` (row, expert) were computed in ``busy_s`` seconds.

    ``weight_bytes`` are held now."""

    pid: int
    epoch: int
    experts: int
    weight_bytes: int
    rows: int
    pairs: int
    busy_s: float


class ExpertShard:
    """One expert shard. After ``listen`` it serves every wire that connects, until ``stop``, with what ``load`` and
    ``keep`` have given it: both may be called while it serves."""

    def __init__(self, name: str, model: ModelSettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._model = model
        self._spec = load_spec(model.path)
        self._bank = ExpertBank({}, self._spec.d_model, model.torch_dtype, model.row_block)
        self._changing = threading.Lock()
        self._epoch = 0
        self._loaded_bytes = 0
        self._rows = self._pairs = 0
        self._busy_s = 0.0
        self._loop = LoopThread(name, self._on_frame, self._on_gone, threads=model.thread_count)
        self._endpoint = make_endpoint(name, self._loop.add)

    def listen(self) -> Address:
        """Start to serve. Returns where routers connect."""
        self._loop.start()
        return self._endpoint.address

    def load(self, epoch: int, experts: Iterable[Expert]) -> int:
        """Read the weights of those of ``experts`` that are not here yet, for the map of ``epoch``.

        Nothing is taken away: maps of other epochs go on being served. Returns how many were read.
        """
        with self._changing:
            missing = set(experts) - self._bank.experts
            with Checkpoint(self._model.path) as checkpoint:
                read = ExpertBank.load(
                    self._spec,
                    checkpoint,
                    missing,
                    dtype=self._model.torch_dtype,
                    row_block=self._model.row_block,
                    progress=self._count,
                )
            self._bank, self._epoch = self._bank.with_(read), epoch
        return len(missing)

    def keep(self, epoch: int, experts: Iterable[Expert]) -> None:
        """Let go of everything but ``experts``: no router works by another map than ``epoch`` any more."""
        with self._changing:
            self._bank, self._epoch = self._bank.only(experts), epoch

    def loaded_bytes(self) -> int:
        """Bytes read so far, for a progress bar."""
        return self._loaded_bytes

    def stats(self) -> ExpertStats:
        """What this shard holds and did. Raises RuntimeError when its data plane has failed."""
        self._loop.check()
        bank = self._bank
        return ExpertStats(
            pid=os.getpid(),
            epoch=self._epoch,
            experts=len(bank.experts),
            weight_bytes=bank.nbytes,
            rows=self._rows,
            pairs=self._pairs,
            busy_s=self._busy_s,
        )

    def stop(self) -> None:
        """Close every wire and end the loop thread. Idempotent."""
        self._endpoint.close()
        self._loop.stop()

    def _count(self, read: int) -> None:
        self._loaded_bytes += read

    def _on_frame(self, wire: Wire, frame: Frame) -> None:
        deadline = time.monotonic() + self._model.step_timeout_s
        try:
            parts = self._compute(frame)
        except (ValueError, KeyError, RuntimeError, TransportError) as error:
            text = f"expert shard {self.name}: {type(error).__name__}: {error}"
            wire.send(Kind.FAILED, frame.tag, [text.encode()], deadline)
            return
        wire.send(Kind.RESULTS, frame.tag, parts, deadline)

    def _compute(self, frame: Frame) -> list[memoryview]:
        if frame.kind != Kind.DISPATCH:
            raise ValueError(f"frame kind {frame.kind}; an expert shard takes only DISPATCH ({Kind.DISPATCH})")
        rows_part, pair_row, pair_expert = expect_parts(frame, 3)
        rows = tensor_from(rows_part, self._model.torch_dtype, self._spec.d_model)
        pairs = torch.from_numpy(np.frombuffer(pair_row, np.int32).astype(np.int64))
        experts = torch.from_numpy(np.frombuffer(pair_expert, np.int32).astype(np.int64))
        begin = time.perf_counter()
        out = self._bank.forward(frame.tag.layer, rows, pairs, experts)
        self._busy_s += time.perf_counter() - begin
        self._rows += rows.shape[0]
        self._pairs += pairs.shape[0]
        return [tensor_bytes(out)]

    def _on_gone(self, wire: Wire, error: PeerGone) -> None:
        """A router went away: nothing of it is kept here."""
