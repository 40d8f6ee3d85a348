from __future__ import annotations

from pathlib import Path

from tests.checkpoints import write_qwen3_moe
from tests.paged_runner import random_ids
from tests.parity.quantised import WIDE, divergences


def test_the_more_bits_the_closer_to_the_model_as_it_was(tmp_path: Path) -> None:
    write_qwen3_moe(tmp_path, **{**WIDE, "num_hidden_layers": 2})
    found = divergences(tmp_path, [random_ids(60, seed=seed) for seed in (0, 1)])
    assert 0 < found["int8"].kl < 5e-5 < found["fp8"].kl < 1e-3 < found["int4"].kl < 5e-3
    assert found["int8"].top1 >= 0.97
    assert found["fp8"].top1 >= 0.92
    assert found["int4"].top1 >= 0.75
    assert found["int4"].bytes_per_weight < 0.6
    assert found["int8"].bytes_per_weight == found["fp8"].bytes_per_weight < 1.02
