from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from actors.model.errors import MissingExpert
from actors.model.experts import ExpertBank
from actors.model.families import load_spec
from actors.model.weights import Checkpoint
from tests.checkpoints import write_glm4_moe

EXPERT_BYTES = 3 * 32 * 64 * 4


def load(path: Path, experts: Any, row_block: int = 0, **kwargs: Any) -> ExpertBank:
    with Checkpoint(path) as checkpoint:
        return ExpertBank.load(load_spec(path), checkpoint, experts, torch.float32, row_block, **kwargs)


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(7))


def one_by_one(path: Path, layer: int, x: torch.Tensor, expert: int) -> torch.Tensor:
    with Checkpoint(path) as checkpoint:
        gate, up, down = (
            checkpoint.read(f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight", shape)
            for part, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32)))
        )
    return down @ (F.silu(gate @ x) * (up @ x))


@pytest.mark.parametrize("row_block", [0, 8])
def test_outputs_are_in_the_order_of_the_pairs(glm: tuple[Path, Any], row_block: int) -> None:
    bank = load(glm[0], [(2, e) for e in range(8)], row_block)
    x = rows(5)
    pair_row, pair_expert = torch.tensor([4, 0, 0, 2, 4, 1, 3]), torch.tensor([7, 7, 0, 3, 0, 7, 3])
    out = bank.forward(2, x, pair_row, pair_expert)
    assert out.shape == (7, 64)
    for p in range(7):
        want = one_by_one(glm[0], 2, x[pair_row[p]], int(pair_expert[p]))
        torch.testing.assert_close(out[p], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(bank.forward(2, x, pair_row.int(), pair_expert.int()), out)


def test_no_pairs(glm: tuple[Path, Any]) -> None:
    bank = load(glm[0], [(1, 0)])
    none = torch.zeros(0, dtype=torch.int64)
    assert bank.forward(1, rows(3), none, none).shape == (0, 64)


def test_deterministic_banks_agree_however_experts_are_split(tmp_path: Path) -> None:
    write_glm4_moe(tmp_path, moe_intermediate_size=29)
    everything = [(1, e) for e in range(8)]
    x = rows(40)
    generator = torch.Generator().manual_seed(3)
    pair_row, pair_expert = (torch.randint(0, n, (160,), generator=generator) for n in (40, 8))
    whole = load(tmp_path, everything, row_block=8).forward(1, x, pair_row, pair_expert)
    for start in range(0, 8, 2):
        part = load(tmp_path, everything[start : start + 2], row_block=8)
        mine = (pair_expert // 2 == start // 2).nonzero().flatten()
        for some in (mine, mine[:1], mine.flip(0)[:11]):
            assert torch.equal(part.forward(1, x, pair_row[some], pair_expert[some]), whole[some])


def test_missing_expert_is_named_and_nothing_is_computed(glm: tuple[Path, Any]) -> None:
    bank = load(glm[0], [(1, 0), (1, 3), (2, 4)])
    with pytest.raises(MissingExpert, match="expert 4 of layer 1") as caught:
        bank.forward(1, rows(2), torch.tensor([0, 1]), torch.tensor([3, 4]))
    assert (caught.value.layer, caught.value.expert) == (1, 4)
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (copy.layer, copy.expert, str(copy)) == (1, 4, str(caught.value))


def test_it_reads_its_experts_alone(glm: tuple[Path, Any]) -> None:
    seen: list[int] = []
    spec = load_spec(glm[0])
    quarter = [(layer, e) for layer in spec.moe_layers for e in (1, 6)]
    with Checkpoint(glm[0]) as checkpoint:
        bank = ExpertBank.load(spec, checkpoint, quarter, torch.float32, progress=seen.append)
        everything = 2 * 8 * EXPERT_BYTES
        assert checkpoint.bytes_read == sum(seen) == bank.nbytes == everything // 4
    assert bank.experts == set(quarter)
    assert len(seen) == 4 * 3


def test_bf16_bank_halves_memory_and_wants_bf16_rows(glm: tuple[Path, Any]) -> None:
    with Checkpoint(glm[0]) as checkpoint:
        bank = ExpertBank.load(load_spec(glm[0]), checkpoint, [(1, 0)], torch.bfloat16)
    pair = torch.tensor([0])
    assert bank.nbytes == EXPERT_BYTES // 2
    assert bank.forward(1, rows(1).bfloat16(), pair, pair).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"rows are torch\.float32, this bank computes in torch\.bfloat16"):
        bank.forward(1, rows(1), pair, pair)


@pytest.mark.parametrize("pair", [(0, 0), (3, 0), (1, 8), (1, -1)])
def test_experts_that_the_model_has_not_are_refused(glm: tuple[Path, Any], pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"expert {pair[1]} of layer {pair[0]}: .*0\.\.7 in layers \[1, 2\]"):
        load(glm[0], [pair])
