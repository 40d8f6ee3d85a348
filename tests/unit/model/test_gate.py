from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.model.families import load_spec
from actors.model.gate import Gate, GateWeights
from actors.model.spec import GateSpec, MoESpec
from actors.model.weights import Checkpoint, CheckpointError
from tests.checkpoints import WRITERS

CheckpointOf = Callable[..., tuple[Path, Any]]


def rows(count: int, width: int = 64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(11))


def load(path: Path, dtype: torch.dtype = torch.float32, row_block: int = 0) -> Gate:
    with Checkpoint(path) as checkpoint:
        return Gate.load(load_spec(path), checkpoint, dtype, row_block)


CASES = [
    *((family, {}) for family in WRITERS),
    ("deepseek", {"norm_topk_prob": True}),
    ("deepseek_v2", {"n_group": 8, "topk_group": 3}),
    ("deepseek_v3", {"n_group": 8, "topk_group": 3, "norm_topk_prob": False}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}),
    ("glm4_moe", {"routed_scaling_factor": 1.7}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen2_moe", {"norm_topk_prob": True}),
]


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize(("family", "overrides"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_is_the_reference(
    checkpoint_of: CheckpointOf, family: str, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    """Bit for bit, ties in bf16 included: the same operations in the same order."""
    path, model = checkpoint_of(family, 3, dtype=dtype, **overrides)
    spec, gate = load_spec(path), load(path, dtype)
    x = rows(256).to(dtype)
    for layer in spec.moe_layers:
        experts, weights = gate.route(layer, x)
        with torch.no_grad():
            _, want_weights, want_experts = model.model.layers[layer].mlp.gate(x)
        assert experts.dtype == torch.int64
        assert torch.equal(experts, want_experts)
        assert weights.dtype == want_weights.dtype
        assert torch.equal(weights, want_weights)


@pytest.mark.parametrize("family", WRITERS)
def test_deterministic_gate(checkpoint_of: CheckpointOf, family: str) -> None:
    """Close to the plain one, and it does not look at a row's mates."""
    path, _ = checkpoint_of(family, 3)
    layer = load_spec(path).moe_layers[-1]
    gate = load(path, row_block=8)
    x = rows(45)
    experts, weights = gate.route(layer, x)
    plain_experts, plain_weights = load(path).route(layer, x)
    assert torch.equal(experts, plain_experts)
    torch.testing.assert_close(weights, plain_weights, rtol=1e-5, atol=1e-7)
    for row in range(45):
        alone = gate.route(layer, x[row : row + 1])
        assert torch.equal(alone[0][0], experts[row])
        assert torch.equal(alone[1][0], weights[row])


KINDS: dict[str, tuple[GateSpec, torch.dtype]] = {
    "deepseek": (
        GateSpec("softmax", logits="model", scores="model", normalise=True, epsilon=1e-20, weights="model"),
        torch.bfloat16,
    ),
    "deepseek_v2_greedy": (GateSpec("softmax", scale=1.5), torch.float32),
    "deepseek_v2": (GateSpec("softmax", n_group=4, topk_group=2, scale=16.0), torch.float32),
    "deepseek_v3": (
        GateSpec(
            "sigmoid", bias=True, n_group=4, topk_group=2, group_rank="top2_sum", masked=-math.inf, normalise=True,
            epsilon=1e-20, scale=2.5,
        ),
        torch.float32,
    ),
    "mixtral": (GateSpec("softmax", logits="model", ranked=True, normalise=True), torch.bfloat16),
    "qwen2_moe": (GateSpec("softmax", logits="model", ranked=True, weights="model"), torch.bfloat16),
}  # fmt: skip
EXPERTS, TOP_K = 16, 4

logit = st.one_of(
    st.sampled_from([0.0, -0.0, 1e4, -1e4, 1e-30, -1e-30, 1.0, 1.5]),
    st.floats(-1e4, 1e4, width=16),
    st.floats(-8, 8, width=16),
)
tied = st.sampled_from([0.5, 2.0]).flatmap(lambda value: st.lists(st.sampled_from([value, -1.0]), min_size=16))
row = st.one_of(
    st.lists(logit, min_size=EXPERTS, max_size=EXPERTS),
    logit.map(lambda value: [value] * EXPERTS),
    tied.map(lambda values: values[:EXPERTS]),
)
correction = st.lists(st.sampled_from([0.0, 0.25, -0.25, 1.0, -2.0]), min_size=EXPERTS, max_size=EXPERTS)


def by_hand(logits: list[float], scoring: str) -> list[float]:
    """Scores in plain Python floats."""
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-value)) if value > -700 else 0.0 for value in logits]
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def check_row(spec: GateSpec, logits: list[float], bias: list[float], got: dict[int, float], near: float) -> None:
    """``got``: expert -> weight. Scores closer than ``near`` count as tied."""
    scores = by_hand(logits, spec.scoring)
    choice = [score + b for score, b in zip(scores, bias, strict=True)] if spec.bias else scores
    size = EXPERTS // spec.n_group
    best = [sorted(choice[group * size : (group + 1) * size], reverse=True) for group in range(spec.n_group)]
    ranks = [group[0] if spec.group_rank == "max" else group[0] + group[1] for group in best]
    last_kept = sorted(ranks, reverse=True)[spec.topk_group - 1]
    may_be_kept = {group for group in range(spec.n_group) if ranks[group] >= last_kept - 2 * near}
    surely_kept = {
        group for group in range(spec.n_group) if sum(r >= ranks[group] - near for r in ranks) <= spec.topk_group
    }

    outside = {expert for expert in got if expert // size not in may_be_kept}
    assert all(spec.masked == 0.0 and got[expert] == 0.0 for expert in outside), "masked scores are exactly 0"
    assert len({expert // size for expert in set(got) - outside}) <= spec.topk_group or spec.masked == 0.0
    worst = min(0.0 if expert in outside else choice[expert] for expert in got)
    passed_over = [choice[e] for e in range(EXPERTS) if e not in got and e // size in surely_kept]
    assert all(value <= worst + near for value in passed_over)

    total = sum(scores[expert] for expert in got) + spec.epsilon if spec.normalise else 1.0
    for expert, weight in got.items():
        want = 0.0 if expert in outside else scores[expert] / total * spec.scale
        assert weight == 0.0 or weight == pytest.approx(want, rel=4 * near, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(logits=st.lists(row, min_size=1, max_size=3), bias=correction)
@example(logits=[[0.0] * EXPERTS], bias=[0.0] * EXPERTS)
@example(logits=[[1e4, -1e4] * 8, [1e-30, -1e-30] * 8], bias=[0.0, 0.25] * 8)
@example(logits=[[1e4, 9.9e3, *[-1e4] * 14]], bias=[-2.0] * EXPERTS)
def test_rule(kind: str, logits: list[list[float]], bias: list[float]) -> None:
    """A gate whose weight is the identity gets its logits as rows."""
    spec, dtype = KINDS[kind]
    precise = torch.float32 if spec.logits == "float32" else dtype
    weights = GateWeights(torch.eye(EXPERTS, dtype=precise), torch.tensor(bias) if spec.bias else None)
    gate = Gate(MoESpec(EXPERTS, TOP_K, 8, spec), {0: weights})
    x = torch.tensor(logits).to(dtype)
    experts, weight = gate.route(0, x)
    assert experts.shape == weight.shape == (len(logits), TOP_K)
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    near = 1e-6 if spec.scores == "float32" and spec.weights == "float32" else 2**-7
    for given_logits, chosen, w in zip(x.tolist(), experts.tolist(), weight.tolist(), strict=True):
        assert len(set(chosen)) == TOP_K
        assert all(0 <= expert < EXPERTS for expert in chosen)
        check_row(spec, given_logits, bias, dict(zip(chosen, w, strict=True)), near)
        if spec.ranked:
            assert w == sorted(w, reverse=True)


@pytest.mark.usefixtures("torch_products")  # of equals each takes others
def test_masked_experts_that_must_be_taken_weigh_nothing() -> None:
    """Softmax leaves exact zeros; among those, V2's gate may take experts of dropped groups, as transformers' does."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    spec = KINDS["deepseek_v2"][0]
    config = SimpleNamespace(
        num_experts_per_tok=TOP_K, num_experts=EXPERTS, hidden_size=EXPERTS, routed_scaling_factor=spec.scale,
        topk_method="group_limited_greedy", n_group=spec.n_group, topk_group=spec.topk_group,
    )  # fmt: skip
    theirs = DeepseekV2TopkRouter(config)
    theirs.weight.data = torch.eye(EXPERTS)
    gate = Gate(MoESpec(EXPERTS, TOP_K, 8, spec), {0: GateWeights(torch.eye(EXPERTS), None)})
    draws = torch.randint(0, 24, (500, EXPERTS), generator=torch.Generator().manual_seed(0))
    x = torch.tensor([0.0, -5.0, -6.0, -7.0] + [-1e4] * 20)[draws]
    experts, weights = gate.route(0, x)
    with torch.no_grad():
        _, want_weights, want_experts = theirs(x)
    assert torch.equal(experts, want_experts)
    assert torch.equal(weights, want_weights)
    dropped = (weights == 0) & (x.gather(1, experts) > -100)
    assert dropped.any(), "the case that is meant"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_numbers_choose_like_others_and_harm_none(kind: str, bad: float) -> None:
    spec, dtype = KINDS[kind]
    precise = torch.float32 if spec.logits == "float32" else dtype
    weight = torch.eye(EXPERTS, dtype=precise)
    gate = Gate(MoESpec(EXPERTS, TOP_K, 8, spec), {0: GateWeights(weight, torch.zeros(EXPERTS) if spec.bias else None)})
    x = rows(3, EXPERTS).to(dtype)
    clean = gate.route(0, x)
    for place in (slice(5, 6), slice(None)):
        broken = x.clone()
        broken[1, place] = bad
        experts, weights = gate.route(0, broken)
        assert ((experts >= 0) & (experts < EXPERTS)).all()
        assert all(len(set(chosen)) == TOP_K for chosen in experts.tolist())
        assert weights[1].isnan().any()
        for row_ in (0, 2):
            assert torch.equal(experts[row_], clean[0][row_])
            assert torch.equal(weights[row_], clean[1][row_])


def test_the_bias_chooses_and_does_not_weigh(checkpoint_of: CheckpointOf) -> None:
    path, _ = checkpoint_of("glm4_moe", norm_topk_prob=False)
    gate, layer = load(path), load_spec(path).moe_layers[0]
    bias = gate._layers[layer].bias
    assert bias is not None
    bias[5] = 10.0
    experts, weights = gate.route(layer, rows(16))
    assert (experts == 5).any(dim=1).all()
    assert weights.max() <= 1.0


def test_bf16_rows_are_judged_in_fp32_where_the_family_says_so(glm: tuple[Path, Any]) -> None:
    gate = load(glm[0], torch.bfloat16)
    assert gate._layers[1].weight.dtype == torch.float32
    x = rows(32).to(torch.bfloat16)
    low, high = gate.route(1, x), gate.route(1, x.float())
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1], high[1])


def test_no_rows(checkpoint_of: CheckpointOf) -> None:
    for family in ("deepseek_v2", "glm4_moe", "mixtral"):
        path, _ = checkpoint_of(family)
        spec = load_spec(path)
        experts, weights = load(path).route(spec.moe_layers[0], rows(0))
        assert experts.shape == weights.shape == (0, spec.moe.top_k)


def test_it_reads_the_gates_alone(checkpoint_of: CheckpointOf) -> None:
    for family, expected in (("deepseek_v3", 2 * (16 * 64 + 16) * 4), ("mixtral", 2 * 4 * 64 * 4)):
        path, _ = checkpoint_of(family)
        seen: list[int] = []
        with Checkpoint(path) as checkpoint:
            Gate.load(load_spec(path), checkpoint, torch.float32, progress=seen.append)
            assert checkpoint.bytes_read == sum(seen) == expected


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek_v2", "model.layers.1.mlp.gate.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
    ],
)
def test_a_checkpoint_without_a_gate_is_refused(
    checkpoint_of: CheckpointOf, tmp_path: Path, family: str, name: str
) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = checkpoint_of(family)
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=name):
        Gate.load(load_spec(path), checkpoint, torch.float32)
