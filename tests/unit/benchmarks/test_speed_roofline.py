"""The least time a case can take: bytes and operations counted by hand."""

from __future__ import annotations

import pytest

from actors.model.families import spec_from_config
from actors.model.tensor_list import expected_tensors
from benchmarks.speed_cases import Case
from benchmarks.speed_checkpoint import COMMON, SHAPES
from benchmarks.speed_roofline import (
    Machine,
    Shapes,
    distinct,
    popularity,
    prefill_seconds,
    roof,
    step_bytes,
    token_ops,
)

SMALL = Shapes(body=100, head=50, embed=50, expert=10, layers=2, experts=4, top_k=1, kv_floats=3, score_width=5)
EVEN = popularity(SMALL)
SLOW_MEMORY = Machine(bandwidth=1.0, float_ops=1e12, int_ops=1e12)
SLOW_CORES = Machine(bandwidth=1e12, float_ops=1.0, int_ops=4.0)


def lite8() -> Shapes:
    return Shapes.of(spec_from_config(COMMON | SHAPES["lite8"], ""))


def test_a_model_is_counted_tensor_by_tensor() -> None:
    spec = spec_from_config(COMMON | SHAPES["lite8"], "")
    shapes = Shapes.of(spec)
    assert shapes.total == sum(tensor.numel for tensor in expected_tensors(spec))
    assert shapes.expert == 3 * 2048 * 1408
    assert (shapes.layers, shapes.experts, shapes.top_k) == (7, 64, 6)
    assert shapes.kv_floats == 8 * (512 + 64)
    assert shapes.score_width == 8 * 16 * (192 + 128)
    assert [shapes.weight_bytes(p) / shapes.total for p in ("bf16", "int8", "int4")] == [2.0, 1.0, 0.5]


def test_an_expert_is_hit_once_however_many_tokens_choose_it() -> None:
    assert distinct(1, [0.25] * 4) == pytest.approx(1.0)
    assert distinct(2, [0.25] * 4) == pytest.approx(4 * (1 - 0.75**2))
    assert distinct(100, [1.0, 0.0]) == 1.0


def test_counted_rows_tell_who_is_popular() -> None:
    assert EVEN == [[0.25] * 4] * 2
    assert popularity(SMALL, [[3, 1, 0, 0], [2, 2, 2, 2]]) == [[0.75, 0.25, 0.0, 0.0], [0.25] * 4]
    assert popularity(SMALL, [[3, 1, 0, 0], [0, 0, 0, 0]]) == EVEN
    assert distinct(8, popularity(SMALL, [[7, 1, 0, 0], [1, 1, 1, 1]])[0]) < distinct(8, EVEN[0])


def test_a_step_reads_body_head_the_experts_hit_and_what_each_stream_keeps() -> None:
    one = step_bytes(SMALL, "bf16", 1, 7.0, EVEN)
    assert one == pytest.approx(2 * (100 + 50 + 2 * 10) + 7 * 3 * 2)
    assert step_bytes(SMALL, "int4", 1, 0.0, EVEN) == pytest.approx((100 + 50 + 20) / 2)
    hit = 2 * 4 * (1 - 0.75**3)
    assert step_bytes(SMALL, "bf16", 3, 7.0, EVEN) == pytest.approx(2 * (150 + hit * 10) + 3 * 7 * 3 * 2)


def test_a_token_is_multiplied_with_what_it_passes() -> None:
    assert token_ops(SMALL, 8.0) == 2 * (100 + 2 * 1 * 10 + 5 * 8)


def test_decoding_is_bound_by_memory_or_by_the_cores() -> None:
    case = Case("decode", 3, 4, 2)
    assert roof(SMALL, "bf16", case, EVEN, SLOW_MEMORY) == pytest.approx(3 / step_bytes(SMALL, "bf16", 3, 5.0, EVEN))
    assert roof(SMALL, "bf16", case, EVEN, SLOW_CORES) == pytest.approx(1 / (token_ops(SMALL, 5.0) + 2 * 50))
    assert roof(SMALL, "int8", case, EVEN, SLOW_CORES) == pytest.approx(4 / (token_ops(SMALL, 5.0) + 2 * 50))


def test_prompts_need_the_head_once_each() -> None:
    case = Case("prefill", 3, 4, 1)
    seconds = 12 * token_ops(SMALL, 2.0) + 3 * 2 * 50
    assert prefill_seconds(SMALL, "bf16", case, EVEN, SLOW_CORES) == pytest.approx(seconds)
    assert roof(SMALL, "bf16", case, EVEN, SLOW_CORES) == pytest.approx(12 / seconds)


def test_a_batch_is_prompts_and_then_all_steps_but_the_first() -> None:
    case = Case("batch", 2, 4, 3)
    prefill = prefill_seconds(SMALL, "bf16", case, EVEN, SLOW_MEMORY)
    step = step_bytes(SMALL, "bf16", 2, 5.5, EVEN)
    assert roof(SMALL, "bf16", case, EVEN, SLOW_MEMORY) == pytest.approx(6 / (prefill + 2 * step))


def test_real_widths_come_to_the_known_roof() -> None:
    """One stream of lite8 at 28.2 GB/s, fixed 1.1 GB and 6 experts of 17.3 MB in 7 layers: about 15 tokens/s."""
    at = Machine(28.2e9, 294e9, 1002e9)
    shapes = lite8()
    assert roof(shapes, "bf16", Case("decode", 1, 128, 32), popularity(shapes), at) == pytest.approx(15.0, abs=0.2)
    assert roof(shapes, "bf16", Case("prefill", 32, 128, 1), popularity(shapes), at) == pytest.approx(217, abs=6)
