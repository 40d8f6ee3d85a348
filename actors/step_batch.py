"""Between the engine's words (chunks of requests) and the model's (packed rows), whole or in micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from actors.engine.plan import Chunk
from actors.engine.sampling import sample
from actors.model.batch import Segment, StepBatch


def split_chunks(chunks: Sequence[Chunk], parts: int) -> list[list[Chunk]]:
    """The chunks of a step as ``parts`` micro-batches whose numbers of rows differ by two at most.

    Decodes (chunks of one row) and prefills are dealt out separately, each in order, so that every part has its share
    of both. A prefill may be cut into pieces in consecutive parts, of which only the last draws; the targets of a
    prompt go with their rows. So a chunk must not read what another chunk of the step writes.

    Raises ValueError unless 1 <= parts <= rows.
    """
    rows = sum(len(chunk.token_ids) for chunk in chunks)
    if not 1 <= parts <= rows:
        raise ValueError(f"parts is {parts}; allowed is 1 to the number of rows, {rows}")
    if parts == 1:
        return [list(chunks)]
    decodes = [chunk for chunk in chunks if len(chunk.token_ids) == 1]
    prefills = [chunk for chunk in chunks if len(chunk.token_ids) > 1]
    split, decoded, filled = [], 0, 0
    for part in range(1, parts + 1):
        until = len(decodes) * part // parts
        fill = max(filled, rows * part // parts - until)
        split.append([*decodes[decoded:until], *_rows_between(prefills, filled, fill)])
        decoded, filled = until, fill
    return split


def _rows_between(chunks: Sequence[Chunk], start: int, stop: int) -> Iterator[Chunk]:
    """The rows ``start .. stop`` of the chunks, laid end to end."""
    first = 0
    for chunk in chunks:
        length = len(chunk.token_ids)
        begin, end = max(start - first, 0), min(stop - first, length)
        if begin < end:
            yield chunk if end - begin == length else _piece(chunk, begin, end)
        first += length


def _piece(chunk: Chunk, begin: int, end: int) -> Chunk:
    return replace(
        chunk,
        token_ids=chunk.token_ids[begin:end],
        start=chunk.start + begin,
        slots=chunk.slots[begin:end],
        draw=chunk.draw if end == len(chunk.token_ids) else None,
        prompt_targets=chunk.prompt_targets[begin:end],
    )


def step_batch(chunks: Sequence[Chunk], device: torch.device) -> StepBatch:
    """The chunks one after the other, on ``device``. Logits are wanted for the last row of each chunk that draws, in
    order, and behind these for each row that has a prompt target, in order."""
    starts = list(itertools.accumulate((len(c.token_ids) for c in chunks), initial=0))
    drawing = [end - 1 for end, c in zip(starts[1:], chunks, strict=True) if c.draw]
    told = [start + i for start, c in zip(starts, chunks, strict=False) for i in range(len(c.prompt_targets))]
    return StepBatch(
        token_ids=torch.tensor([t for c in chunks for t in c.token_ids], device=device),
        positions=torch.cat([torch.arange(c.start, c.start + len(c.token_ids)) for c in chunks]).to(device),
        slots=torch.tensor([slot for c in chunks for slot in c.slots], device=device),
        segments=[
            Segment(start, len(c.token_ids), c.start, torch.tensor(c.block_table, device=device))
            for start, c in zip(starts, chunks, strict=False)
        ],
        output_rows=torch.tensor(drawing + told, dtype=torch.int64, device=device),
    )


def sample_chunks(chunks: Sequence[Chunk], logits: Tensor) -> list[int | None]:
    """One token per chunk that draws, from ``logits`` [S, V]; None where a row's logits are not finite."""
    return sample(logits, [c.draw for c in chunks if c.draw])
