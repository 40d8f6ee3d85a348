"""Models from quantised checkpoints against transformers, whose weights were dequantised by other means than ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from actors.model.quant.qtensor import QTensor
from actors.model.weights import Checkpoint
from tests.checkpoints import WRITERS
from tests.paged_runner import PagedRunner, random_ids
from tests.quantised_checkpoints import FORMATS, TOKEN, load_reference, write_plain, write_quantised

FAMILIES: dict[str, dict[str, Any]] = {
    # 176 rows of kv_a_proj_with_mqa: one block of 128 and a part of one.
    "deepseek_v3": {"hidden_size": 128, "kv_lora_rank": 160, "qk_rope_head_dim": 16, "q_lora_rank": 64},
    "qwen3_moe": {"mlp_only_layers": [0]},
}


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense layer and one with experts."""
    path = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](path, num_hidden_layers=2, **FAMILIES[request.param])
    return path


@torch.inference_mode()
def theirs(path: Path, ids: list[int], int8_rows: bool = False) -> Tensor:
    model = load_reference(path)
    if int8_rows:
        experts = model.model.layers[1].mlp.experts
        experts.forward = _experts_of_int8_rows.__get__(experts)
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def _experts_of_int8_rows(experts: Any, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts one by one, each product's rows quantised by compressed-tensors."""
    out = torch.zeros_like(rows)
    for row, slot in torch.cartesian_prod(torch.arange(rows.shape[0]), torch.arange(chosen.shape[1])).tolist():
        expert = int(chosen[row, slot])
        gate, up = F.linear(_int8(rows[row : row + 1]), experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out[row] += F.linear(_int8(F.silu(gate) * up), experts.down_proj[expert])[0] * weights[row, slot]
    return out


def _int8(row: Tensor) -> Tensor:
    args = QuantizationArgs(**TOKEN)
    scale, zero = compute_dynamic_scales_and_zp(row[None], args, torch.nn.Identity())
    return fake_quantize(row[None], scale, zero, args)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dequantised_model(plain: Path, tmp_path: Path, name: str) -> None:
    dequantised = write_quantised(plain, tmp_path / "quantised", name)
    write_plain(plain, tmp_path / "dequantised", dequantised)
    ids = random_ids(12, seed=3)
    want = theirs(tmp_path / "dequantised", ids, int8_rows=name == "W8A8")
    for row_block in (0, 8):
        runner = PagedRunner(tmp_path / "quantised", row_block=row_block)
        got = runner.step([(runner.add(ids), len(ids))])[0]
        errors = (got - want).abs().amax(-1) / want.abs().max()
        if name == "W8A8":
            # An element that lies within 1e-7 of the middle between two integers may fall to either: the reference's
            # own rows, up to 5 of 12, move as far when its embeddings change by 2e-7, and processors differ by that.
            assert errors.median() <= 1e-5
            assert errors.max() <= 3e-3
        else:
            assert errors.max() <= 1e-5
    expert = runner.bank._expert(1, 0)
    for matrix in (expert.gate_up, expert.down):
        assert isinstance(matrix, QTensor)
        assert bool(matrix.row_group) == (name == "W8A8")
    unquantised = theirs(plain, ids)
    assert (got - unquantised).abs().max() > 1e-3 * unquantised.abs().max()


def test_fp8_of_v32_as_it_is_released(tmp_path: Path) -> None:
    """The latent's and the indexer's projections are quantised too."""
    source, folder = tmp_path / "plain", tmp_path / "quantised"
    WRITERS["deepseek_v32"](source, num_hidden_layers=2)
    dequantised = write_quantised(source, folder, "fp8")
    with Checkpoint(folder) as checkpoint:
        for name in ("kv_a_proj_with_mqa", "indexer.wq_b", "indexer.wk"):
            assert checkpoint.dtype(f"model.layers.0.self_attn.{name}.weight") == torch.float8_e4m3fn
    write_plain(source, tmp_path / "dequantised", dequantised)
    ids = random_ids(12, seed=3)
    want = theirs(tmp_path / "dequantised", ids)
    runner = PagedRunner(folder)
    got = runner.step([(runner.add(ids), len(ids))])[0]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
