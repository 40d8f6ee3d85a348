from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.model.families import load_spec
from actors.model.gate import Gate
from actors.model.weights import Checkpoint, CheckpointError
from tests.checkpoints import write_deepseek_v3, write_glm4_moe


def rows(count: int, width: int = 64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(11))


def by_hand(x: list[float], weight: list[list[float]], bias: list[float], spec: Any) -> dict[int, float]:
    """Expert -> weight for one row, in plain Python floats: the slow, obvious reference."""
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in weight]
    scores = torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = spec.n_experts // spec.gate.n_group
    best = {g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(spec.gate.n_group)}
    groups = sorted(best, key=lambda g: -best[g])[: spec.gate.topk_group]
    allowed = [e for e in range(spec.n_experts) if e // size in groups]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: spec.top_k]
    total = sum(scores[e] for e in chosen) if spec.gate.normalise else 1.0
    return {e: scores[e] / total * spec.gate.scale for e in chosen}


@pytest.mark.parametrize(
    ("write", "overrides"),
    [
        (write_deepseek_v3, {}),
        (write_deepseek_v3, {"n_group": 8, "topk_group": 3, "norm_topk_prob": False}),
        (write_deepseek_v3, {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}),
        (write_glm4_moe, {"routed_scaling_factor": 1.7}),
    ],
)
@pytest.mark.parametrize("row_block", [0, 8])
def test_gate_is_the_reference_and_the_rule(
    tmp_path: Path, write: Any, overrides: dict[str, Any], row_block: int
) -> None:
    model = write(tmp_path, seed=3, **overrides)
    spec = load_spec(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        gate = Gate.load(spec, checkpoint, row_block=row_block)
    x = rows(64)
    for layer in spec.moe_layers:
        theirs = model.model.layers[layer].mlp.gate
        experts, weights = gate.route(layer, x)
        assert experts.dtype == torch.int64
        assert weights.dtype == torch.float32
        assert experts.shape == weights.shape == (64, spec.moe.top_k)
        with torch.no_grad():
            _, want_weights, want_experts = theirs(x)
        assert torch.equal(experts, want_experts)
        torch.testing.assert_close(weights, want_weights, rtol=1e-6, atol=1e-7)
        bias = theirs.e_score_correction_bias.double().tolist()
        for row in range(0, 64, 8):
            want = by_hand(x[row].double().tolist(), theirs.weight.double().tolist(), bias, spec.moe)
            got = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
            assert got == pytest.approx(want, rel=1e-5)


def test_the_bias_chooses_and_does_not_weigh(tmp_path: Path) -> None:
    write_glm4_moe(tmp_path, norm_topk_prob=False)
    spec = load_spec(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        gate = Gate.load(spec, checkpoint)
    layer = spec.moe_layers[0]
    x = rows(16)
    gate._layers[layer].bias[5] = 10.0
    experts, weights = gate.route(layer, x)
    assert (experts == 5).any(dim=1).all()
    assert weights.max() <= 1.0


def test_bf16_rows_are_judged_in_fp32(glm: tuple[Path, Any]) -> None:
    spec = load_spec(glm[0])
    with Checkpoint(glm[0]) as checkpoint:
        gate = Gate.load(spec, checkpoint)
    x = rows(32).to(torch.bfloat16)
    low, high = gate.route(1, x), gate.route(1, x.float())
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1], high[1])


def test_deterministic_gate_does_not_look_at_mates(deepseek: tuple[Path, Any]) -> None:
    spec = load_spec(deepseek[0])
    with Checkpoint(deepseek[0]) as checkpoint:
        gate = Gate.load(spec, checkpoint, row_block=8)
    x = rows(45)
    experts, weights = gate.route(2, x)
    for row in range(45):
        alone = gate.route(2, x[row : row + 1])
        assert torch.equal(alone[0][0], experts[row])
        assert torch.equal(alone[1][0], weights[row])


def test_no_rows(glm: tuple[Path, Any]) -> None:
    spec = load_spec(glm[0])
    with Checkpoint(glm[0]) as checkpoint:
        gate = Gate.load(spec, checkpoint)
        experts, weights = gate.route(1, rows(0))
    assert experts.shape == weights.shape == (0, 4)


def test_it_reads_the_gates_alone(deepseek: tuple[Path, Any]) -> None:
    spec = load_spec(deepseek[0])
    seen: list[int] = []
    with Checkpoint(deepseek[0]) as checkpoint:
        Gate.load(spec, checkpoint, progress=seen.append)
        assert checkpoint.bytes_read == sum(seen) == 2 * (16 * 64 + 16) * 4


def test_a_checkpoint_without_correction_bias_is_refused(deepseek: tuple[Path, Any]) -> None:
    spec = load_spec(deepseek[0])
    with Checkpoint(deepseek[0]) as checkpoint:
        del checkpoint._file_of["model.layers.1.mlp.gate.e_score_correction_bias"]
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate\.e_score_correction_bias"):
            Gate.load(spec, checkpoint)
