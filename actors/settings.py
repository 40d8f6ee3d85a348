"""What an actor must know of the model and of the machine it runs on. Plain data, sent once when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from actors.engine.admission import SchedulerLimits
from actors.model.dtypes import torch_dtype
from actors.quant_kind import QuantKind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModelSettings:
    """``dtype`` is a torch dtype's name ("float32", "bfloat16"). ``row_block`` > 0 is the deterministic mode (see
    ``actors.model.linear``). ``threads``: torch's intra-op threads in this process; 0 means the machine's cores divided
    by ``sharing``, the number of such processes on it. ``device``: where it computes, "cpu" or "cuda" (the first GPU
    that this process sees). ``nccl``: rows travel between routers and expert shards over NCCL. ``quantization``:
    "none", or to what this process' weights are quantised while they are loaded ("int8", "int4", "fp8").
    ``check_weights``: NaN and infinity are looked for meanwhile. ``map_weights``: those that stay as they are are used
    where they lie in files on a local disk."""

    path: Path
    dtype: str
    row_block: int
    threads: int
    step_timeout_s: float
    sharing: int = 1
    device: str = "cpu"
    nccl: bool = False
    quantization: str = "none"
    check_weights: bool = True
    map_weights: bool = True

    @property
    def thread_count(self) -> int:
        """Threads to use on this machine; to be asked in the process itself."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.sharing)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return torch_dtype(self.dtype)

    @property
    def quant_kind(self) -> QuantKind | None:
        """``quantization``, None for "none"."""
        return None if self.quantization == "none" else cast(QuantKind, self.quantization)

    @property
    def torch_device(self) -> torch.device:
        """The device itself."""
        import torch

        return torch.device(self.device)


@dataclass(frozen=True)
class EngineSettings:
    """How one attention shard forms its steps (``limits``), and what it computes them with.

    ``kv_bytes`` bounds the KV cache; None: it gets ``kv_share`` of what is free once all weights are loaded, divided by
    ``sharing``, the number of attention shards in that memory. ``block_size``: tokens of a KV block.
    ``micro_batches``: of a step; 0: as many as the measured times of both fleets ask for.
    """

    limits: SchedulerLimits
    kv_bytes: int | None
    block_size: int
    kv_share: float = 0.5
    sharing: int = 1
    micro_batches: int = 0
