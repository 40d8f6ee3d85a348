"""ExpertShard: holds the weights of some (layer, expert) pairs and computes them for whoever sends rows.

It keeps no state of any request: a DISPATCH frame comes, a RESULTS frame with the same tag goes back. So a shard may
be added, copied, or killed while streams run.
"""

from __future__ import annotations

import os
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


@dataclass(frozen=True)
class ExpertStats:
    """Counters since the start; ``rows`` were received, ``pairs`` (row, expert) were computed."""

    pid: int
    epoch: int
    experts: int
    weight_bytes: int
    rows: int
    pairs: int
    compute_s: float


class ExpertShard:
    """One expert shard. ``load`` once, then it serves every wire that connects, until ``stop``."""

    def __init__(self, name: str, model: ModelSettings, make_endpoint: EndpointFactory) -> None:
        self.name = name
        self._model = model
        self._spec = load_spec(model.path)
        self._bank: ExpertBank | None = None
        self._epoch = 0
        self._loaded_bytes = 0
        self._rows = self._pairs = 0
        self._compute_s = 0.0
        self._loop = LoopThread(name, self._on_frame, self._on_gone, threads=model.thread_count)
        self._endpoint = make_endpoint(name, self._loop.add)

    def load(self, epoch: int, experts: Iterable[tuple[int, int]]) -> Address:
        """Read the weights of ``experts`` and start to serve. Returns where routers connect."""
        with Checkpoint(self._model.path) as checkpoint:
            self._bank = ExpertBank.load(
                self._spec,
                checkpoint,
                experts,
                dtype=self._model.torch_dtype,
                row_block=self._model.row_block,
                progress=self._count,
            )
        self._epoch = epoch
        self._loop.start()
        return self._endpoint.address

    def loaded_bytes(self) -> int:
        """Bytes read so far, for a progress bar."""
        return self._loaded_bytes

    def stats(self) -> ExpertStats:
        """What this shard holds and did."""
        bank = self._bank
        return ExpertStats(
            pid=os.getpid(),
            epoch=self._epoch,
            experts=len(bank.experts) if bank else 0,
            weight_bytes=self._loaded_bytes,
            rows=self._rows,
            pairs=self._pairs,
            compute_s=self._compute_s,
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
        assert self._bank is not None  # the loop starts after the weights are read
        rows_part, pair_row, pair_expert = expect_parts(frame, 3)
        rows = tensor_from(rows_part, self._model.torch_dtype, self._spec.d_model)
        pairs = torch.from_numpy(np.frombuffer(pair_row, np.int32).astype(np.int64))
        experts = torch.from_numpy(np.frombuffer(pair_expert, np.int32).astype(np.int64))
        begin = time.perf_counter()
        out = self._bank.forward(frame.tag.layer, rows, pairs, experts)
        self._compute_s += time.perf_counter() - begin
        self._rows += rows.shape[0]
        self._pairs += pairs.shape[0]
        return [tensor_bytes(out)]

    def _on_gone(self, wire: Wire, error: PeerGone) -> None:
        """A router went away: nothing of it is kept here."""
