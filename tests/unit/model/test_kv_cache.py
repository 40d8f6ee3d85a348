from __future__ import annotations

import pytest
import torch

from actors.model.batch import MAX_GATHER_TOKENS, Segment, StepBatch
from actors.model.families import spec_from_config
from actors.model.kv_cache import KVCache
from tests.checkpoints import DEEPSEEK_V3, GLM4_MOE

GLM = spec_from_config({**GLM4_MOE, "model_type": "glm4_moe"})
V3 = spec_from_config({**DEEPSEEK_V3, "model_type": "deepseek_v3"})


@pytest.mark.parametrize(("spec", "floats"), [(GLM, 3 * 2 * 2 * 32), (V3, 3 * (32 + 8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(spec: object, floats: int, dtype: torch.dtype) -> None:
    cache = KVCache(spec, n_blocks=5, block_size=16, dtype=dtype)
    assert KVCache.bytes_per_token(spec, dtype) == floats * dtype.itemsize
    assert cache.nbytes == 5 * 16 * KVCache.bytes_per_token(spec, dtype)


@pytest.mark.parametrize("spec", [GLM, V3])
def test_what_is_written_is_read_in_any_shape(spec: object) -> None:
    cache = KVCache(spec, n_blocks=4, block_size=4, dtype=torch.float32)
    first_shape, second_shape = spec.attn.kv_planes
    slots = torch.tensor([9, 0, 15])
    first, second = torch.randn(3, *first_shape), torch.randn(3, *second_shape)
    cache.write(1, slots, first, second)
    got = cache.read(1, slots)
    assert torch.equal(got[0], first)
    assert torch.equal(got[1], second)
    square = cache.read(1, torch.tensor([[15, 9], [0, 0]]))
    assert torch.equal(square[0], first[torch.tensor([[2, 0], [1, 1]])])
    assert square[1].shape == (2, 2, *second_shape)
    assert cache.read(0, slots)[0].abs().sum() == 0, "another layer was written"
    square[0].zero_()
    assert torch.equal(cache.read(1, slots)[0], first), "read gave a view"


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0), (-1, 4)])
def test_impossible_sizes(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"n_blocks is {blocks}, block_size is {size}"):
        KVCache(GLM, blocks, size, torch.float32)


def test_slots_follow_the_block_table() -> None:
    segment = Segment(start=0, length=2, context=5, block_table=torch.tensor([7, 2, 30]))
    assert segment.slots(4).tolist() == [28, 29, 30, 31, 8, 9, 10]
    with pytest.raises(ValueError, match="block_table has 3 blocks, 7 tokens need 4 of 2"):
        segment.slots(2)


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


def test_decode_groups_bound_what_they_gather() -> None:
    batch = decode_batch([MAX_GATHER_TOKENS // 4] * 6 + [2 * MAX_GATHER_TOKENS])
    sizes = [group.slots.shape for group in batch.decode_groups(4)]
    assert sum(shape[0] for shape in sizes) == 7
    assert all(shape[0] * shape[1] <= MAX_GATHER_TOKENS or shape[0] == 1 for shape in sizes)
