from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.model.batch import MAX_GATHER_TOKENS, Segment, StepBatch
from actors.model.families import spec_from_config
from actors.model.kv_cache import KVCache
from actors.model.spec import IndexerSpec
from tests.checkpoints import DEEPSEEK_V3, GLM4_MOE

GLM = spec_from_config({**GLM4_MOE, "model_type": "glm4_moe"})
V3 = spec_from_config({**DEEPSEEK_V3, "model_type": "deepseek_v3"})
V32 = replace(V3, attn=replace(V3.attn, indexer=IndexerSpec(heads=8, head_dim=16, top_k=6)))


@pytest.mark.parametrize(("spec", "floats"), [(GLM, 3 * 2 * 2 * 32), (V3, 3 * (32 + 8)), (V32, 3 * (32 + 8 + 16))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(spec: object, floats: int, dtype: torch.dtype) -> None:
    cache = KVCache(spec, n_blocks=5, block_size=16, dtype=dtype)
    assert KVCache.bytes_per_token(spec, dtype) == floats * dtype.itemsize
    assert cache.nbytes == 5 * 16 * KVCache.bytes_per_token(spec, dtype)


@pytest.mark.parametrize("spec", [GLM, V3, V32])
def test_what_is_written_is_read_in_any_shape(spec: object) -> None:
    cache = KVCache(spec, n_blocks=4, block_size=4, dtype=torch.float32)
    slots = torch.tensor([9, 0, 15])
    planes = [torch.randn(3, *shape) for shape in spec.attn.kv_planes]
    cache.write(1, slots, *planes)
    for got, plane in zip(cache.read(1, slots), planes, strict=True):
        assert torch.equal(got, plane)
    square = cache.read(1, torch.tensor([[15, 9], [0, 0]]))
    for got, plane in zip(square, planes, strict=True):
        assert torch.equal(got, plane[torch.tensor([[2, 0], [1, 1]])])
    assert all(plane.abs().sum() == 0 for plane in cache.read(0, slots)), "another layer was written"
    square[0].zero_()
    assert torch.equal(cache.read(1, slots)[0], planes[0]), "read gave a view"


def test_planes_are_read_singly_and_written_together() -> None:
    cache = KVCache(V32, n_blocks=2, block_size=4, dtype=torch.float32)
    slots = torch.tensor([3, 6])
    planes = [torch.randn(2, *shape) for shape in V32.attn.kv_planes]
    cache.write(0, slots, *planes)
    (last,) = cache.read(0, slots, (2,))
    assert torch.equal(last, planes[2])
    assert [plane.shape[1] for plane in cache.read(0, slots, (1, 0))] == [8, 32]
    with pytest.raises(ValueError, match="shorter"):
        cache.write(0, slots, *planes[:2])


@pytest.mark.parametrize("spec", [GLM, V3, V32])
def test_blocks_are_copied_in_order_in_every_layer(spec: object) -> None:
    cache = KVCache(spec, n_blocks=4, block_size=4, dtype=torch.float32)
    slots = torch.arange(16)
    written = [[torch.randn(16, *shape) for shape in spec.attn.kv_planes] for _ in range(spec.n_layers)]
    for layer, planes in enumerate(written):
        cache.write(layer, slots, *planes)
    cache.copy_blocks(((3, 1), (1, 0), (2, 3)))
    for layer, planes in enumerate(written):
        for got, plane in zip(cache.read(layer, slots), planes, strict=True):
            blocks = plane.unflatten(0, (4, 4))
            assert torch.equal(got.unflatten(0, (4, 4)), blocks[[3, 3, 2, 2]])


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0), (-1, 4)])
def test_impossible_sizes(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"n_blocks is {blocks}, block_size is {size}"):
        KVCache(GLM, blocks, size, torch.float32)


def test_slots_follow_the_block_table() -> None:
    segment = Segment(start=0, length=2, context=5, block_table=torch.tensor([7, 2, 30]))
    assert segment.slots(4).tolist() == [28, 29, 30, 31, 8, 9, 10]
    with pytest.raises(ValueError, match="block_table has 3 blocks, 7 tokens need 4 of 2"):
        segment.slots(2)


def test_rows_for_the_paged_kernel() -> None:
    """Packed where some are left out, as they lie where none is; a short table is refused before memory is read."""
    tables = [torch.tensor([7, 2]), torch.tensor([5]), torch.tensor([9, 1])]
    lengths, contexts = (3, 1, 2), (1, 2, 5)
    segments = [Segment(s, n, c, t) for s, n, c, t in zip((0, 3, 4), lengths, contexts, tables, strict=True)]
    empty = torch.empty(6, dtype=torch.int64)
    batch = StepBatch(empty, empty, empty, segments, empty)
    every, some = batch.paged_rows(4, 3), batch.paged_rows(4, 2)
    assert every is not None
    assert some is not None
    assert every.rows == slice(None)
    assert every.spans.tolist() == [[0, 3, 1, 0], [3, 1, 2, 2], [4, 2, 5, 3]]
    assert every.tables.tolist() == [7, 2, 5, 9, 1]
    assert isinstance(some.rows, torch.Tensor)
    assert some.rows.tolist() == [3, 4, 5]
    assert some.spans.tolist() == [[0, 1, 2, 0], [1, 2, 5, 1]]
    assert some.tables.tolist() == [5, 9, 1]
    assert batch.paged_rows(4, 0) is None
    with pytest.raises(ValueError, match="block_table has 1 blocks, 3 tokens need 2 of 2"):
        batch.paged_rows(2, 3)


def decode_batch(contexts: list[int]) -> StepBatch:
    segments = [
        Segment(row, 1, context, torch.arange(context // 4 + 1) + 100 * row) for row, context in enumerate(contexts)
    ]
    rows = torch.arange(len(contexts))
    return StepBatch(rows, rows, rows, segments, rows)


def test_decode_groups_hold_every_decode_once_with_its_slots() -> None:
    contexts = [0, 3, 100, 2, 60, 64, 70, 3]
    batch = decode_batch(contexts)
    batch.segments.append(Segment(8, 5, 0, torch.arange(2)))
    seen = {}
    for group in batch.decode_groups(4):
        for i, row in enumerate(group.rows.tolist()):
            mask = torch.ones_like(group.slots[i], dtype=torch.bool) if group.mask is None else group.mask[i]
            seen[row] = group.slots[i][mask].tolist()
            assert (group.slots[i][~mask] == group.slots[i][0]).all()
            assert len(group.slots[i]) < 2 * (contexts[row] + 1)
    assert seen == {row: batch.segments[row].slots(4).tolist() for row in range(8)}


@pytest.mark.parametrize("window", [1, 5, 64])
def test_decode_groups_of_a_window_hold_its_tokens_alone(window: int) -> None:
    contexts = [0, 3, 100, 4, 60, 63, 64, 2, 3]
    batch = decode_batch(contexts)
    seen = {}
    for group in batch.decode_groups(4, window):
        assert group.slots.shape[1] <= window
        for i, row in enumerate(group.rows.tolist()):
            mask = torch.ones_like(group.slots[i], dtype=torch.bool) if group.mask is None else group.mask[i]
            seen[row] = group.slots[i][mask].tolist()
    assert seen == {row: batch.segments[row].slots(4)[-window:].tolist() for row in range(9)}
    assert batch.decode_groups(4, window) is batch.decode_groups(4, window)
    assert batch.decode_groups(4)[-1].slots.shape[1] == 101


def test_decode_groups_bound_what_they_gather() -> None:
    batch = decode_batch([MAX_GATHER_TOKENS // 4] * 6 + [2 * MAX_GATHER_TOKENS])
    sizes = [group.slots.shape for group in batch.decode_groups(4)]
    assert sum(shape[0] for shape in sizes) == 7
    assert all(shape[0] * shape[1] <= MAX_GATHER_TOKENS or shape[0] == 1 for shape in sizes)


@pytest.mark.parametrize("resident", [True, False])
def test_memory_is_taken_at_once_or_as_it_is_written(resident: bool) -> None:
    """64 MiB; the process may grow and shrink by a little else meanwhile."""
    spec = V3
    slots = (64 << 20) // KVCache.bytes_per_token(spec, torch.float32)
    before = _resident_bytes()
    cache = KVCache(spec, slots // 16, 16, torch.float32, resident=resident)
    grown = _resident_bytes() - before
    assert (grown > 48 << 20) == resident
    assert (grown < 16 << 20) != resident
    assert cache.nbytes > 60 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
