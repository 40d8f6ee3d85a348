"""Between the engine's words (chunks of requests) and the model's (packed rows)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from actors.engine.plan import StepPlan
from actors.engine.sampling import sample
from actors.model.batch import Segment, StepBatch


def step_batch(plan: StepPlan, device: torch.device) -> StepBatch:
    """The plan's chunks one after the other, on ``device``; logits are wanted for the last row of each chunk that
    samples."""
    chunks = plan.chunks
    starts = list(itertools.accumulate((len(c.token_ids) for c in chunks), initial=0))
    return StepBatch(
        token_ids=torch.tensor([t for c in chunks for t in c.token_ids], device=device),
        positions=torch.cat([torch.arange(c.start, c.start + len(c.token_ids)) for c in chunks]).to(device),
        slots=torch.tensor([slot for c in chunks for slot in c.slots], device=device),
        segments=[
            Segment(start, len(c.token_ids), c.start, torch.tensor(c.block_table, device=device))
            for start, c in zip(starts, chunks, strict=False)
        ],
        output_rows=torch.tensor(
            [end - 1 for end, c in zip(starts[1:], chunks, strict=True) if c.draw], dtype=torch.int64, device=device
        ),
    )


def sample_plan(plan: StepPlan, logits: Tensor) -> list[int | None]:
    """One token per chunk that samples, from ``logits`` [S, V]; None where a row's logits are not finite."""
    return sample(logits, [c.draw for c in plan.chunks if c.draw])
