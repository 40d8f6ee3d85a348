from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from actors.model.errors import CheckpointError, MissingExpert
from actors.model.experts import ExpertBank
from actors.model.families import load_spec
from actors.model.mlp import SwiGLU
from actors.model.parallel import READERS
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


def test_rows_of_another_width_are_refused(glm: tuple[Path, Any]) -> None:
    bank, one = load(glm[0], [(2, 0)]), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows have 32 columns, the experts take 64"):
        bank.forward(2, rows(1)[:, :32], one, one)


def test_experts_of_one_layer_may_differ_in_width() -> None:
    experts = {(0, i): SwiGLU(torch.ones(2 * inter, 64), torch.ones(64, inter)) for i, inter in enumerate((4, 3))}
    bank = ExpertBank(experts, 64, torch.float32)
    out = bank.forward(0, torch.ones(1, 64), torch.tensor([0, 0]), torch.tensor([1, 0]))
    assert torch.equal(out, torch.tensor([[3.0], [4.0]]).expand(2, 64) * 64 * 64)


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
    assert len(seen) > 1


def fuse(path: Path, folder: Path) -> Path:
    """The checkpoint in ``path`` with each layer's experts in two tensors."""
    tensors = load_file(path / "model.safetensors")
    for layer in (1, 2):
        block = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{block}.{e}.{part}_proj.weight") for e in range(8)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{block}.gate_up_proj": torch.cat([gate, up], 1), f"{block}.down_proj": down}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((path / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_fused_experts_are_read_one_by_one(
    glm: tuple[Path, Any], tmp_path: Path, dtype: torch.dtype, quantization: Any
) -> None:
    wanted = [(1, 0), (1, 7), (2, 3)]
    x, pair = rows(2).to(dtype), torch.tensor([0, 1])
    banks = []
    for path in (glm[0], fuse(glm[0], tmp_path / "fused")):
        with Checkpoint(path) as checkpoint:
            banks.append(
                ExpertBank.load(load_spec(path), checkpoint, wanted, dtype, row_block=8, quantization=quantization)
            )
            assert checkpoint.bytes_read == 3 * EXPERT_BYTES
    assert banks[0].nbytes == banks[1].nbytes
    for layer, experts in ((1, torch.tensor([7, 0])), (2, torch.tensor([3, 3]))):
        assert torch.equal(*(bank.forward(layer, x, pair, experts) for bank in banks))


def test_experts_of_their_own_go_before_fused_ones(glm: tuple[Path, Any], tmp_path: Path) -> None:
    path = fuse(glm[0], tmp_path / "both")
    spoilt = {name: torch.zeros_like(value) for name, value in load_file(path / "model.safetensors").items()}
    save_file({**spoilt, **load_file(glm[0] / "model.safetensors")}, path / "model.safetensors")
    pair = torch.tensor([0])
    both, own = (load(folder, [(1, 0)]).forward(1, rows(1), pair, pair) for folder in (path, glm[0]))
    assert torch.equal(both, own)


def test_experts_that_are_nowhere_are_named_as_they_should_be(glm: tuple[Path, Any], tmp_path: Path) -> None:
    path = fuse(glm[0], tmp_path / "none")
    tensors = {name: value for name, value in load_file(path / "model.safetensors").items() if "experts." not in name}
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight'"):
        load(path, [(1, 3)])


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.27), ("fp8", 0.27), ("int4", 0.16)])
def test_quantised_experts_take_less_memory_and_nearly_agree(
    glm: tuple[Path, Any], quantization: Any, share: float
) -> None:
    plain, bank = load(glm[0], [(1, 0)]), load(glm[0], [(1, 0)], quantization=quantization)
    assert EXPERT_BYTES / 8 < bank.nbytes < share * EXPERT_BYTES
    pair = torch.zeros(16, dtype=torch.int64)
    outs = [held.forward(1, rows(16), torch.arange(16), pair) for held in (plain, bank)]
    assert 0 < (outs[0] - outs[1]).norm() / outs[0].norm() < 0.3


def test_experts_are_read_at_the_same_time(glm: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each first read waits until as many experts are under way as there are readers."""
    together, first, real = threading.Barrier(READERS), threading.local(), os.preadv

    def wait(*args: Any) -> int:
        if not hasattr(first, "over"):
            first.over = True
            together.wait(timeout=30)
        return real(*args)

    monkeypatch.setattr(os, "preadv", wait)
    assert len(load(glm[0], [(1, e) for e in range(8)]).experts) == 8


def test_one_reader_reads_one_expert_after_the_other(glm: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    threads, real = set[int](), os.preadv

    def note(*args: Any) -> int:
        threads.add(threading.get_ident())
        return real(*args)

    monkeypatch.setattr(os, "preadv", note)
    assert len(load(glm[0], [(1, e) for e in range(8)], readers=1).experts) == 8
    assert len(threads) == 1


@pytest.mark.parametrize(("quantization", "trimmed"), [(None, False), ("int8", True)])
def test_the_heap_is_trimmed_where_something_was_dropped(
    glm: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, quantization: Any, trimmed: bool
) -> None:
    trims: list[int] = []
    monkeypatch.setattr("actors.model.heap.EVERY_BYTES", 1)
    monkeypatch.setattr("actors.model.heap._malloc_trim", trims.append)
    load(glm[0], [(1, 0), (1, 1)], quantization=quantization)
    assert len(trims) == (2 + 1 if trimmed else 0)


def test_sizes_are_added_up_once(glm: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bank = load(glm[0], [(1, 0), (1, 3), (2, 4)])
    both = bank.with_(load(glm[0], [(1, 0), (2, 5)]))
    monkeypatch.setattr(torch.Tensor, "nbytes", property(lambda self: pytest.fail("asked a tensor for its size")))
    assert (bank.nbytes, both.nbytes) == (3 * EXPERT_BYTES, 4 * EXPERT_BYTES)
    few = both.only([(1, 0), (2, 5), (2, 7)])
    assert (few.nbytes, few.experts) == (2 * EXPERT_BYTES, {(1, 0), (2, 5)})


def test_an_error_ends_the_load_and_its_threads(glm: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        load(glm[0], [(layer, e) for layer in (1, 2) for e in range(8)])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


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
